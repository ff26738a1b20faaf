"""What became of blocks: a short memory of those that left, the news of those that came and went, and the lookups that
found less than they asked for.

Kept for readers outside: whoever asks why a prompt missed, routers that follow what is stored where, and people who
watch. A planner without such readers (a trace replay, a store inside one engine) has no journal and pays nothing.

The hard thing: readers may be slow or absent, so all parts are bounded. What does not fit is dropped, oldest first,
and `num_dropped` and, to whoever takes events, `Event.DROPPED` say that it was. Under the store's lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.plan.records import Explanation, Request
from kvstore.plan.state import Page
from radix.hashing import BlockHash


class Left(Enum):
    """Why a copy is no longer in a tier."""

    EVICTED = "evicted"  # it made room for others
    EXPIRED = "expired"  # it outlived its time to live
    DELETED = "deleted"  # somebody asked for it
    LOST = "lost"  # the tier did not have it any more, or failed to read it
    DETACHED = "detached"  # the tier was taken away


class Event(Enum):
    """News, in the words engines use."""

    STORED = "BlockStored"
    REMOVED = "BlockRemoved"
    CLEARED = "AllBlocksCleared"
    DROPPED = "Dropped"  # events before this one were lost: what was told until then may not be so any more


@dataclass(frozen=True, slots=True)
class Departure:
    """The last copy of a block that left a tier. at: Unix time."""

    at: float
    tier: str
    why: Left


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Pages of one layer group that came to a tier or left it.

    keys:    block hashes; parents: of each, the block before it, None at the root.
    """

    event: Event
    at: float
    tier: str = ""
    group: int = 0
    keys: tuple[BlockHash, ...] = ()
    parents: tuple[BlockHash | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A lookup that matched less than the prompt, and why, as things were then. at: Unix time."""

    at: float
    num_tokens: int
    session: str
    told: Explanation


class Journal:
    """Departures, events and shortfalls. Under the store's lock.

    wall:           clock, Unix time.
    max_departures: blocks whose leaving is remembered.
    max_events:     events kept for `take_events`; none are made while `wants_events` is false.
    max_shortfalls: lookups that fell short which are remembered.
    """

    def __init__(
        self,
        wall: Callable[[], float],
        max_departures: int = 65_536,
        max_events: int = 65_536,
        max_shortfalls: int = 256,
    ) -> None:
        self.wants_events = False
        self.shortfalls: deque[Shortfall] = deque(maxlen=max_shortfalls)
        self.num_dropped = 0
        self._wall = wall
        self._departures: OrderedDict[BlockHash, Departure] = OrderedDict()
        self._max_departures = max_departures
        self._events: deque[BlockEvent] = deque()
        self._has_dropped = False  # since the last `take_events`
        self._max_events = max_events

    def stored(self, tier: str, pages: Sequence[Page]) -> None:
        """Pages are whole in a tier."""
        if self.wants_events and pages:
            self._note(Event.STORED, tier, pages)

    def removed(self, tier: str, pages: Sequence[Page], why: Left) -> None:
        """Pages are no longer in a tier."""
        if not pages:
            return
        self.leaving(tier, pages, why)
        if self.wants_events:
            self._note(Event.REMOVED, tier, pages)

    def leaving(self, tier: str, pages: Sequence[Page], why: Left) -> None:
        """Pages will never be found in a tier again, though somebody may still be reading them."""
        departure = Departure(self._wall(), tier, why)
        for page in pages:
            key = page.block.key
            self._departures[key] = departure
            self._departures.move_to_end(key)
        while len(self._departures) > self._max_departures:
            self._departures.popitem(last=False)

    def cleared(self) -> None:
        """Everything was deleted."""
        if self.wants_events:
            self._append(BlockEvent(Event.CLEARED, self._wall()))

    def departure(self, key: BlockHash) -> Departure | None:
        """When and why a block last left a tier; None if it never did, or too long ago."""
        return self._departures.get(key)

    def fell_short(self, request: Request, told: Explanation) -> None:
        """A lookup was counted that did not match all it could have."""
        self.shortfalls.append(Shortfall(self._wall(), request.num_tokens, request.options.session, told))

    def take_events(self) -> list[BlockEvent]:
        """The news since the last call; first of them `DROPPED` if not all could be kept."""
        events, self._events = list(self._events), deque()
        if self._has_dropped:
            self._has_dropped = False
            events.insert(0, BlockEvent(Event.DROPPED, self._wall()))
        return events

    def _note(self, event: Event, tier: str, pages: Sequence[Page]) -> None:
        at = self._wall()
        groups: dict[int, list[Page]] = {}
        for page in pages:
            groups.setdefault(page.group, []).append(page)
        for group, members in groups.items():
            blocks = [page.block for page in members]
            keys = tuple(block.key for block in blocks)
            parents = tuple(None if block.parent is None else block.parent.key for block in blocks)
            self._append(BlockEvent(event, at, tier, group, keys, parents))

    def _append(self, event: BlockEvent) -> None:
        if len(self._events) >= self._max_events:
            self._events.popleft()
            self.num_dropped += 1
            self._has_dropped = True
        self._events.append(event)
