"""Plug-ins of other distributions: entry points of one group, found by name, loaded when they are asked for.

A `Plugins` knows the names of its group without importing anything; `get` imports the one that is asked for. Our own
are found like any other. Where our distribution's metadata is absent or old (sources on a path), they are taken from
the table `ours`, which says the same as pyproject.toml: a test compares the two.

The hard thing: a package that somebody else installed must not break what works without it. So one that cannot be
imported, has the wrong interface or takes a name in use is an error only for whoever asks for that name; `problems`
tells them all, for listings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from typing import Generic, TypeVar

from kvstore.errors import ConfigError

OURS = "kvtiers"

# A section of the configuration, a part of environment variables and metrics: no other characters.
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point. value: "package.module:attribute". distribution: its name and version."""

    name: str
    value: str
    distribution: str

    @property
    def is_ours(self) -> bool:
        """True if our own distribution brings it."""
        return self.distribution.split(" ")[0] == OURS

    def __str__(self) -> str:
        return f"{self.value} of distribution {self.distribution}" if self.distribution else self.value


class Plugins(Generic[T]):
    """The plug-ins of one group. Any thread: what is kept is only ever added to."""

    def __init__(
        self,
        group: str,
        what: str,
        ours: Mapping[str, str],
        check: Callable[[str, object], T],
        *,
        taken: Collection[str] = (),
    ) -> None:
        """group: of the entry points. what: the noun for messages, such as "tier".

        ours:  name -> value of our own, in the order in which they are listed.
        check: returns what was loaded as a T, or raises TypeError with the end of a sentence that says what is wrong.
        taken: names that mean something else already.
        """
        self.group = group
        self._what = what
        self.ours = {name: Plugin(name, value, OURS) for name, value in ours.items()}
        self._check = check
        self._taken = frozenset(taken)
        self._loaded: dict[Plugin, T] = {}

    def names(self) -> tuple[str, ...]:
        """Every name that can be asked for: ours first, then others by the alphabet. Imports nothing."""
        return (*self.ours, *(name for name in sorted(self._others()) if name not in self.ours))

    def is_ours(self, name: str) -> bool:
        """True if the name is one of our own distribution's."""
        return name in self.ours

    def find(self, name: str) -> Plugin | None:
        """Return the entry point of a name; None if no installed distribution has it.

        Raises ConfigError if two have it.
        """
        if name in self.ours:
            return self.ours[name]
        found = self._others().get(name, ())
        if len(found) > 1:
            both = " and ".join(str(plugin) for plugin in found)
            raise ConfigError(f"{self._what} {name} is claimed by {both}; uninstall one of them")
        return found[0] if found else None

    def get(self, name: str) -> T | None:
        """Import the plug-in of a name; None if no installed distribution has it.

        Raises ConfigError, naming distribution and attribute, for one that cannot be imported or is of another kind.
        """
        plugin = self.find(name)
        if plugin is None:
            return None
        if plugin not in self._loaded:
            self._loaded[plugin] = self.load(plugin)
        return self._loaded[plugin]

    def load(self, plugin: Plugin) -> T:
        """Import one, wherever it comes from. Raises ConfigError as `get` does."""
        module, _, attribute = plugin.value.partition(":")
        try:
            found = attrgetter(attribute)(import_module(module))
        except Exception as error:  # whatever somebody else's module does when it is imported
            raise ConfigError(
                f"{self._what} {plugin.name} ({plugin}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
        try:
            return self._check(plugin.name, found)
        except TypeError as error:
            raise ConfigError(f"{self._what} {plugin.name} ({plugin}) {error}") from None

    def all(self) -> dict[str, T]:
        """Import every plug-in; those that cannot be had are left out, and told by `problems`."""
        found: dict[str, T] = {}
        for name in self.names():
            try:
                plugin = self.get(name)
            except ConfigError:
                continue
            if plugin is not None:
                found[name] = plugin
        return found

    def problems(self) -> list[str]:
        """Say what is wrong with installed plug-ins: each one's distribution, attribute and fault. Imports them all."""
        problems = []
        for name in self.names():
            try:
                self.get(name)
            except ConfigError as error:  # noqa: PERF203 - a listing, and each may fail by itself
                problems.append(str(error))
        for point in _entry_points(self.group, tuple(sys.path)):
            reason = self._refusal(point)
            if reason and not point.is_ours:
                problems.append(f"{self._what} {point.name} ({point}) is left out: {reason}")
        return problems

    def origin(self, name: str) -> str:
        """Return attribute and distribution of a name, for messages."""
        return str(self.find(name))

    # ---- private ----------------------------------------------------------------------------------------------------

    def _others(self) -> dict[str, tuple[Plugin, ...]]:
        found: dict[str, tuple[Plugin, ...]] = {}
        for point in _entry_points(self.group, tuple(sys.path)):
            if not point.is_ours and not self._refusal(point):
                found[point.name] = (*found.get(point.name, ()), point)
        return found

    def _refusal(self, plugin: Plugin) -> str:
        if plugin.name in self.ours:
            return f"the name is in use, by {self.ours[plugin.name]}"
        if plugin.name in self._taken:
            return "the name is in use, and means something else"
        if not _NAME.fullmatch(plugin.name):
            return "a name is made of a-z, 0-9 and single _"
        return ""


@lru_cache(maxsize=32)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """Read the metadata of all distributions, once for each search path: tens of milliseconds where there are many."""
    from importlib import metadata  # 60 modules, where names of others are asked for

    found = {}
    for point in metadata.entry_points(group=group):
        of = point.dist
        told = "unknown" if of is None else f"{of.metadata['Name']} {of.version}"
        plugin = Plugin(point.name, point.value, told)
        found[plugin.name, plugin.value] = plugin
    return tuple(sorted(found.values(), key=lambda plugin: (plugin.name, plugin.distribution)))


def missing_members(found: object, protocol: type) -> list[str]:
    """Return the public members of a Protocol that an object lacks."""
    wanted = {*vars(protocol), *getattr(protocol, "__annotations__", ())}
    return sorted(name for name in wanted if not name.startswith("_") and not hasattr(found, name))
