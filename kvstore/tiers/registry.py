"""Kinds of tiers by name, for the configuration, the store, the daemon and the tools.

Everything that must know which tiers there are asks here. Names are known without importing anything; a kind is
imported when its tier is configured or listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvstore.errors import ConfigError
from kvstore.plugins import Plugins, missing_members
from kvstore.tiers.base import Tier
from kvstore.tiers.kind import TierKind

GROUP = "kvtiers.tiers"
# As pyproject.toml has them, nearest first.
OURS = {"disk": "kvstore.tiers.disk.kind:KIND", "redis": "kvstore.tiers.redis.kind:KIND"}
# Sections of the configuration, tiers that are always there, and words that stand beside tiers in answers.
TAKEN = ("store", "host", "breaker", "service", "gpu", "computed", "engines")

_COLOR = re.compile(r"(#[0-9a-f]{6})?")


def _checked(name: str, found: object) -> TierKind[Any]:
    from kvstore.config.section import Section  # the library of settings, where a tier has some

    if not isinstance(found, TierKind):
        raise TypeError(f"is {type(found).__name__}; it must be a kvstore.tiers.kind.TierKind")
    if found.name != name:
        raise TypeError(f"has the name {found.name!r}; it must be that of its entry point")
    if not (isinstance(found.section, type) and issubclass(found.section, Section)):
        raise TypeError(f"has section {found.section!r}; it must be a subclass of kvstore.config.section.Section")
    fields = found.section.model_fields
    for role in ("switch", "directory", "capacity", "address"):
        field = getattr(found, role)
        if field is not None and field not in fields:
            raise TypeError(f"has {role} {field!r}; its section has only {', '.join(fields)}")
    for role in ("open", "traits", "secrets"):
        if not callable(getattr(found, role)):
            raise TypeError(f"has {role} {getattr(found, role)!r}; it must be callable")
    required = [field for field, info in fields.items() if info.is_required()]
    if required:
        raise TypeError(f"has a section without a default for {', '.join(required)}; every field needs one")
    if not _COLOR.fullmatch(found.color):
        raise TypeError(f"has color {found.color!r}; it must be like #0072b2")
    return found


_plugins: Plugins[TierKind[Any]] = Plugins(GROUP, "tier", OURS, _checked, taken=TAKEN)

names = _plugins.names
is_ours = _plugins.is_ours
find = _plugins.get
kinds = _plugins.all
problems = _plugins.problems
origin = _plugins.origin


def kind_of(name: str) -> TierKind[Any]:
    """Return a kind by name. Raises ConfigError if no installed distribution has it, or if it is broken."""
    kind = find(name)
    if kind is None:
        raise ConfigError(unknown(name))
    return kind


def unknown(name: str) -> str:
    """Say that nobody brings a tier of this name."""
    return f"no installed package provides tier {name}; installed: {', '.join(names())}"


def switches() -> list[str]:
    """Return the fields that turn tiers on, by their full names. Imports every kind."""
    return [f"{name}.{kind.switch}" for name, kind in kinds().items()]


def medium(name: str) -> str:
    """Return "storage" or "network"; "" for a tier that is not installed here, as of a daemon's."""
    try:
        kind = find(name)
    except ConfigError:
        return ""
    return "" if kind is None else kind.medium


def over_network(by_tier: Mapping[str, int]) -> int:
    """Return the sum of what is counted for tiers that lie behind a network, as near to other machines as to this."""
    return sum(count for name, count in by_tier.items() if medium(name) == "network")


def check_tier(kind: TierKind[Any], tier: object) -> Tier:
    """Return what `kind.open` has made as a Tier. Raises ConfigError if it is none."""
    lacks = missing_members(tier, Tier)
    if lacks:
        raise ConfigError(f"tier {kind.name} ({origin(kind.name)}): what it opens has no {', '.join(lacks)}")
    name = getattr(tier, "name", None)
    if name != kind.name:
        raise ConfigError(f"tier {kind.name} ({origin(kind.name)}): what it opens is called {name!r}")
    return tier  # type: ignore[return-value]  # all its members were just looked at
