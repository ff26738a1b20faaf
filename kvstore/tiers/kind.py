"""A kind of tier: all that the store, the daemon and the tools must know of it to use it by name.

A package brings one as an entry point of the group `kvtiers.tiers` (docs/extending.md):

    [project.entry-points."kvtiers.tiers"]
    shelf = "kvtiers_shelf:KIND"

The name is the section of the configuration, and the tier's name in the API, the dashboard and metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from kvstore.layout import Layout
from kvstore.tiers.base import Tier

if TYPE_CHECKING:
    from kvstore.config.section import Section

S = TypeVar("S", bound="Section")


@dataclass(frozen=True, slots=True)
class TierContext:
    """The store that a tier is opened for.

    layout: sizes of pages; a slot has `layout.slot_bytes`.
    place:  text that is the namespace's own, to keep its pages apart on a medium that many share; "" without a
            namespace (an engine that names pages itself, with the namespace in every key).
    """

    layout: Layout
    place: str = ""


@dataclass(frozen=True, slots=True)
class TierTraits:
    """The traits that the planner may count on.

    is_indexed:  what the planner knows of the tier is good enough for a lookup: pages stay until the planner has them
                 deleted, or the tier says so when it is read. Else only an answer of `contains` is.
    is_shared:   others write to it too, so a lookup asks it for what the planner does not know.
    has_capacity: `Tier.capacity_pages` is a number: the planner keeps within it, and names what leaves. Else the medium
                 makes room by itself.
    can_claim:   the tier is `Claimable`, and what is computed under a claim will be there.
    is_verified: `read_into` checks every page as `Tier` demands. If not, the store checks what it reads against what it
                 wrote itself: pages of an earlier process are then misses.
    """

    is_indexed: bool = True
    is_shared: bool = False
    has_capacity: bool = True
    can_claim: bool = False
    is_verified: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """The words of a medium about itself, one line each.

    text: for the operator. warning: what should be changed; "" if nothing.
    """

    text: str
    warning: str = ""


@dataclass(frozen=True, slots=True)
class TierKind(Generic[S]):
    """A tier by name. Nothing heavy is imported for it: `open` imports what the tier needs.

    name:      of section, tier, metrics.
    section:   model of its settings. Of these the store understands, where the model has them: `policy`, `ttl_s`,
               `admit`, `exclusive`, `max_writes_per_day`, `workers`, `timeout_s` and `codec`, as in our sections.
    open:      makes the tier. Raises ConfigError for what cannot be had; a medium that does not answer is no error.
    switch:    the field that turns the tier on; None in it means off.
    traits:    of the tier that these settings make.
    directory: field with the path where its pages lie, if they outlive the process. The daemon then gives each tenant
               and namespace a directory below it, and opens again at its start what lies there.
    capacity:  field with the bytes it may hold, None in it for no bound. The daemon shares them among namespaces.
    address:   field with the URL of a server, if the API may name another.
    ask:       asks a server what it is, for the daemon's start and its readiness. Raises KVStoreError, OSError or
               ValueError if it is not reached.
    secrets:   the words of these settings that no log may show.
    medium:    "storage" of this machine, or "network".
    color:     in pictures and on the dashboard, as "#rrggbb"; "" takes one that is free.
    refuses_resize: what to do instead, where `has_capacity` is false.
    """

    name: str
    section: type[S]
    open: Callable[[S, TierContext], Tier]
    switch: str
    traits: Callable[[S], TierTraits] = field(default=lambda section: TierTraits())
    directory: str | None = None
    capacity: str | None = None
    address: str | None = None
    ask: Callable[[S], Asked] | None = None
    secrets: Callable[[S], Iterable[str]] = field(default=lambda section: ())
    medium: Literal["storage", "network"] = "storage"
    color: str = ""
    refuses_resize: str = "its medium makes room by itself"

    def is_on(self, section: Section) -> bool:
        """True if these settings ask for the tier."""
        return getattr(section, self.switch) is not None

    def off(self, section: S) -> S:
        """Return the settings with the tier turned off."""
        return section.model_copy(update={self.switch: None})

    def home(self, section: Section) -> Path | None:
        """Return the directory of its pages, if it is on and has one."""
        path = None if self.directory is None else getattr(section, self.directory)
        return None if path is None else Path(path)

    def value(self, section: Section, name: str, default: Any) -> Any:
        """Return one of the settings that the store understands; `default` where the model does not have it."""
        return getattr(section, name, default)
