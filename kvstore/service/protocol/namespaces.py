"""Layouts and namespaces as JSON: what a client says in its hello, and what a daemon writes down for its restart.

Everything comes from outside, so every field is checked for type and bound before a dataclass is made of it, and an
error names the field.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout, TensorAxes
from radix.namespace import Namespace

MAX_GROUPS = 4096  # the pieces of a state may be hundreds: 100 MB beside blocks of 16 tokens
MAX_LAYERS = 4096
MAX_PAGE_BYTES = 1 << 30
MAX_BLOCK_SIZE = 65_536
MAX_SHARDS = 1024
MAX_TEXT = 1024
MAX_EXTRA = 64
_AXES = tuple(field.name for field in fields(TensorAxes))


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """A layout as plain values."""
    return {
        "block_size": layout.block_size,
        "groups": [
            {
                "kind": group.kind.value,
                "layers": list(group.layers),
                "page_bytes": group.page_bytes,
                "window": group.window,
                "axes": [[int(getattr(one, name)) for name in _AXES] for one in group.axes],
            }
            for group in layout.groups
        ],
        "format": layout.format,
        "dtype": layout.dtype,
        "shards": layout.shards,
    }


def layout_from_json(value: Any) -> Layout:
    """The layout of plain values. Raises ConfigError naming the field."""
    given = _object("layout", value, ("block_size", "groups", "format", "dtype", "shards"))
    groups = given["groups"]
    if not isinstance(groups, list) or not 1 <= len(groups) <= MAX_GROUPS:
        raise ConfigError(f"layout.groups is {_show(groups)}; it must be a list of 1 to {MAX_GROUPS} groups")
    return Layout(
        _integer("layout.block_size", given["block_size"], 1, MAX_BLOCK_SIZE),
        tuple(_group(f"layout.groups[{index}]", group) for index, group in enumerate(groups)),
        _text("layout.format", given["format"]),
        _text("layout.dtype", given["dtype"]),
        _integer("layout.shards", given["shards"], 1, MAX_SHARDS),
    )


def namespace_to_json(namespace: Namespace) -> dict[str, Any]:
    """A namespace as plain values."""
    values: dict[str, Any] = {field.name: getattr(namespace, field.name) for field in fields(namespace)}
    return values | {"extra": [list(pair) for pair in namespace.extra]}


def namespace_from_json(value: Any) -> Namespace:
    """The namespace of plain values. Raises ConfigError naming the field."""
    names = tuple(field.name for field in fields(Namespace))
    given = _object("namespace", value, names)
    extra = given.pop("extra")
    if (
        not isinstance(extra, list)
        or len(extra) > MAX_EXTRA
        or not all(isinstance(pair, list) and len(pair) == 2 for pair in extra)
    ):
        raise ConfigError(f"namespace.extra is {_show(extra)}; it must be a list of [name, value] pairs")
    pairs = tuple((_text("namespace.extra", name), _text("namespace.extra", text)) for name, text in extra)
    given["block_size"] = _integer("namespace.block_size", given["block_size"], 1, MAX_BLOCK_SIZE)
    for name in names:
        if name not in ("block_size", "extra"):
            given[name] = _text(f"namespace.{name}", given[name])
    try:
        return Namespace(**given, extra=pairs)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from None


def check_pair(layout: Layout, namespace: Namespace) -> None:
    """Raise ConfigError unless a namespace belongs to a layout and its hash is fit for a shared store."""
    if namespace.layout != layout.fingerprint:
        raise ConfigError(f"namespace.layout is {namespace.layout!r}; the layout has {layout.fingerprint!r}")
    if namespace.block_size != layout.block_size:
        raise ConfigError(f"namespace.block_size is {namespace.block_size}; the layout has {layout.block_size}")
    if namespace.hash != "sha256":
        raise ConfigError(
            f"namespace.hash is {namespace.hash!r}; a daemon is shared, so collisions must be impossible to make: "
            "use 'sha256'"
        )


def _group(name: str, value: Any) -> LayerGroup:
    given = _object(name, value, ("kind", "layers", "page_bytes", "window"), optional=("axes",))
    kinds = [kind.value for kind in GroupKind]
    if given["kind"] not in kinds:
        raise ConfigError(f"{name}.kind is {_show(given['kind'])}; it must be one of {', '.join(kinds)}")
    layers = given["layers"]
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise ConfigError(f"{name}.layers is {_show(layers)}; it must be a list of at most {MAX_LAYERS} numbers")
    window = given["window"]
    return LayerGroup(
        GroupKind(given["kind"]),
        tuple(_integer(f"{name}.layers", layer, 0, MAX_LAYERS) for layer in layers),
        _integer(f"{name}.page_bytes", given["page_bytes"], 1, MAX_PAGE_BYTES),
        None if window is None else _integer(f"{name}.window", window, 1, 1 << 31),
        _axes(f"{name}.axes", given.get("axes", [])),
    )


def _axes(name: str, value: Any) -> tuple[TensorAxes, ...]:
    if not isinstance(value, list) or len(value) > 2 * MAX_LAYERS:
        raise ConfigError(f"{name} is {_show(value)}; it must be a list of at most {2 * MAX_LAYERS} tensors")
    for one in value:
        if not isinstance(one, list) or len(one) != len(_AXES):
            raise ConfigError(f"{name} holds {_show(one)}; it must hold lists of {len(_AXES)} numbers")
    rows = [[_integer(name, number, 0, MAX_PAGE_BYTES) for number in one] for one in value]
    return tuple(TensorAxes(bool(is_key), *numbers) for is_key, *numbers in rows)


def _object(name: str, value: Any, names: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {_show(value)}; it must be an object")
    for missing in set(names) - set(value):
        raise ConfigError(f"{name}.{missing} is missing")
    for unknown in set(value) - set(names) - set(optional):
        raise ConfigError(f"{name}.{unknown:.64} is not known; known are {', '.join(names)}")
    return dict(value)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} is {_show(value)}; it must be a whole number in [{least}, {most}]")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not _has_bytes(value):
        raise ConfigError(f"{name} is {_show(value)}; it must be text of at most {MAX_TEXT} characters")
    return value


def _has_bytes(text: str) -> bool:
    try:
        return text.encode() is not None
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return False


def _show(value: object) -> str:
    """A value in a message. Text and what holds text is told by its size: it may be a salt, and messages are logged."""
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
