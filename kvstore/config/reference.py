"""A configuration in print: the effective values with their sources, and the reference of all fields.

For `kvstore config`. docs/configuration.md is made from here (`kvstore config --markdown`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from kvstore.config.paths import shown
from kvstore.config.sections import Config
from kvstore.config.sources import known_fields, section_model
from kvstore.config.values import known_policy
from kvstore.tiers import registry
from kvstore.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One field of a configuration, as `kvstore config` prints it."""

    field: str
    value: Any
    source: str
    description: str

    @property
    def json_value(self) -> Any:
        """The value as JSON has it: bytes and seconds as numbers; never a password."""
        return self.value if isinstance(self.value, (bool, int, float, dict, type(None))) else shown(str(self.value))

    @property
    def text(self) -> str:
        """The value as people read it; never a password."""
        return _readable(self.field, self.value)


def effective(config: Config) -> list[Row]:
    """Every field with its value, where that came from, and what it means."""
    rows, tiers = [], registry.names()
    for section, names in known_fields(Config).items():
        values = config.tier(section) if section in tiers else getattr(config, section)
        for name in names:
            full = f"{section}.{name}"
            info = type(values).model_fields[name]
            rows.append(Row(full, getattr(values, name), config.source(full), info.description or ""))
    return rows


def markdown() -> str:
    """The reference of all fields, as it stands in docs/configuration.md."""
    lines = []
    for section, names in known_fields(Config).items():
        model = section_model(Config, section)
        assert model is not None
        lines += [f"### `[{section}]`", "", (model.__doc__ or "").strip(), ""]
        lines += ["| field | default | allowed | what it does |", "|---|---|---|---|"]
        for name in names:
            info = model.model_fields[name]
            default = _readable(name, info.default)
            lines.append(f"| `{name}` | {default} | {_allowed(name, info)} | {info.description} |")
        lines.append("")
    return "\n".join(lines)


def _readable(field: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{word}={format_seconds(seconds)}" for word, seconds in value.items()) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    if field.endswith("_bytes"):
        return format_bytes(value)
    if field.endswith("_s"):
        return format_seconds(value)
    return shown(str(value))


def _allowed(name: str, info: FieldInfo) -> str:
    """The allowed values, from the type and its bounds."""
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
    if info.annotation is bool:
        return "`true`, `false`"
    if any(isinstance(mark, AfterValidator) and mark.func is known_policy for mark in info.metadata):
        from kvstore.policies import names

        return ", ".join(f"`{policy}`" for policy in (*names(), "package.module:Class"))
    if get_origin(info.annotation) is dict:
        return "times by word"
    bounds = []
    for mark in info.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(mark, kind):
                limit = getattr(mark, kind.__name__.lower())
                bounds.append(f"{sign} {_readable(name, limit)}")
    if bounds:
        return ", ".join(bounds)
    return (
        "a path, `none`"
        if info.annotation == (Path | None)
        else "a URL, `none`"
        if name == "url"
        else "text without spaces and braces"
    )
