"""The settings that both seats have in SGLang's configuration, and the check of its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelFields:
    """How the maker of a page is identified.

    weights:          "sampled" identifies the weights by sizes, headers and samples of their files, "full" by all their
                      bytes; anything else is taken as the name of the weights, and you vouch for it.
    adapters_by_name: true if a name and path of `--lora-paths` means the same adapter on every engine and at any time:
                      SGLang's hashes say no more of it.
    updates_by_name:  true if a `weight_version` means the same weights on every engine and at any time. Without it,
                      nothing is loaded or stored once weights were updated while the server runs.
    """

    weights: str = "sampled"
    adapters_by_name: bool = False
    updates_by_name: bool = False

    def check(self, where: str) -> None:
        """Raise ConfigError for a value that is none. where: the argument that holds the settings."""
        check_value(where, "weights", self.weights, isinstance(self.weights, str) and bool(self.weights), WEIGHTS_ARE)
        for name in ("adapters_by_name", "updates_by_name"):
            value = getattr(self, name)
            check_value(where, name, value, isinstance(value, bool), "true or false")


WEIGHTS_ARE = "'sampled', 'full' or a name"
Fields = TypeVar("Fields", bound=ModelFields)


def check_value(where: str, name: str, value: object, is_right: bool, right: str) -> None:
    """Raise ConfigError unless a value is right."""
    if not is_right:
        raise ConfigError(f"{where}: {name} is {value!r}; it must be {right}")


def split(
    extra: Mapping[str, Any], kind: type[Fields], sections: Sequence[str], where: str
) -> tuple[dict[str, Any], Fields]:
    """Split what is configured into sections of `kvstore.Config` and fields. Raises ConfigError for what is neither."""
    names = [field.name for field in fields(kind)]
    known = [*sections, *names]
    for key, value in extra.items():
        head = str(key).split(".")[0]
        if head not in known:
            close = get_close_matches(head, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        if key in sections and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be an object of fields")
    given = kind(**{name: extra[name] for name in names if name in extra})
    given.check(where)
    return {key: value for key, value in extra.items() if str(key).split(".")[0] in sections}, given
