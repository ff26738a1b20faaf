"""Outlook: evict what is least likely to be used again for the time that it would be held.

What the policy is told of requests (`used`, `ended`) says who used which blocks last (visits.py); what becomes of
blocks of a kind says what the others are worth (survival.py). Victims are taken cohort by cohort, the least worth
first, and of one request's blocks the deepest first, so that prefixes stay whole. The order is looked at again after
each request (after every 16 half of the gain is gone, since what is new waits): of cohorts, never of blocks.

Worth is by the hour, so nothing is left of the idea that what is used often is worth keeping: what was used often and
was not used lately is of a kind of its own, and leaves when blocks of that kind do not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic

from eviction.beliefs import beliefs
from eviction.policy import Belief, Ending, Hint, K, PromptUse
from eviction.ranked import Ranked
from eviction.visits import Cohort, Visits
from radix.ordered import OrderedMap

MOST_OPEN = 4096  # requests whose end is awaited
LEAST_AHEAD = 64  # blocks that a look at the order finds at least
AHEAD_SHARE = 1 / 256  # and of all blocks


class OutlookOrder(Generic[K]):
    """The keys of one priority, in the order of what their blocks are worth.

    keys: of all priorities, by the name of their block; shared by all orders, as `visits` is.
    """

    def __init__(self, keys: OrderedMap[Hashable, tuple[K, ...]], visits: Visits) -> None:
        self._all = keys
        self._visits = visits
        self._members: OrderedMap[K, None] = OrderedMap()
        self._name_of: Callable[[K], Hashable] | None = None
        self._ahead: list[Cohort] = []  # least worth first
        self._at = 0
        self._seen = -1  # version of the visits at the last look

    def add(self, keys: list[K], hits: int) -> None:
        """Take keys in, deepest first. Their blocks' uses are told elsewhere."""
        fresh: list[Hashable] = []
        for key in keys:
            if key in self._members:
                continue
            self._members[key] = None
            name = self._name(key)
            others = self._all.get(name, ())
            self._all[name] = (*others, key)
            if not others:
                fresh.append(name)
        fresh.reverse()
        self._visits.arrive(fresh)
        if hits:  # they were used meanwhile
            self._visits.touch(fresh)

    def touch(self, keys: list[K]) -> None:
        """Blocks that a request told of stay as they are; others are the newest of their kind again."""
        self._visits.touch(list(reversed(dict.fromkeys(self._name(key) for key in keys if key in self._members))))

    def renew(self, keys: list[K]) -> None:
        """The same: it is the request's end that tells."""
        self.touch(keys)

    def discard(self, keys: list[K]) -> None:
        """Forget keys; their blocks are remembered for a while."""
        gone: list[Hashable] = []
        for key in keys:
            if key not in self._members:
                continue
            del self._members[key]
            name = self._name(key)
            others = tuple(other for other in self._all.pop(name) if other is not key)
            if others:
                self._all[name] = others
            else:
                gone.append(name)
        self._visits.leave(gone)

    hold = discard

    def release(self, keys: list[K], hits: int) -> None:
        """Make held keys members again."""
        self.add(keys, hits)

    def name_by(self, name_of: Callable[[K], Hashable]) -> None:
        """Take what names the block of a key."""
        self._name_of = name_of

    def victims(self, n: int) -> list[K]:
        """Return the `n` keys that are worth least."""
        found: list[K] = []
        if n <= 0 or not self._members:
            return found
        if self._visits.version != self._seen or self._at >= len(self._ahead):
            self._look(n)
        self._collect(n, found)
        if len(found) < min(n, len(self._members)):
            found.clear()
            self._look(len(self._all))
            self._collect(n, found)
        return found

    def members(self) -> list[K]:
        """Return every key."""
        return list(self._members)

    def is_empty(self) -> bool:
        """True if it has no key."""
        return not self._members

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def _name(self, key: K) -> Hashable:
        return key if self._name_of is None else self._name_of(key)

    def _look(self, n: int) -> None:
        self._ahead = self._visits.least_worth(max(2 * n, LEAST_AHEAD, int(AHEAD_SHARE * len(self._all))))
        self._at = 0
        self._seen = self._visits.version

    def _collect(self, n: int, found: list[K]) -> None:
        """Add up to `n` keys to `found`, from the cohorts ahead."""
        taken: set[int] = set()
        at = self._at
        while at < len(self._ahead) and len(found) < n:
            cohort = self._ahead[at]
            if not cohort.resident and at == self._at:
                self._at += 1
            for part in _deepest_first(cohort):
                if part.resident and part.number not in taken and len(found) < n:
                    taken.add(part.number)
                    self._take(part, n, found)
            at += 1

    def _take(self, cohort: Cohort, n: int, found: list[K]) -> None:
        """Add the keys of a cohort, deepest block first, until there are `n`."""
        names, visits = cohort.names, self._visits
        while cohort.top:
            name = names[cohort.top - 1]
            if name in self._all and visits.is_last(cohort, name):
                break
            cohort.top -= 1
        for at in range(cohort.top - 1, -1, -1):
            keys = self._all.get(names[at])
            if keys is not None and visits.is_last(cohort, names[at]):
                found.extend(key for key in keys if key in self._members)
                if len(found) >= n:
                    del found[n:]
                    return


def _deepest_first(cohort: Cohort) -> list[Cohort]:
    parts = [cohort]
    while parts[-1].deeper is not None:
        parts.append(parts[-1].deeper)
    parts.reverse()
    return parts


class Outlook(Ranked[K]):
    """Evict what is least likely to be used again in the time it would be held, lower priorities first."""

    def __init__(self) -> None:
        self._keys: OrderedMap[Hashable, tuple[K, ...]] = OrderedMap()
        self._visits = Visits(self._keys)
        self._open: OrderedMap[int, PromptUse] = OrderedMap()
        super().__init__(lambda: OutlookOrder(self._keys, self._visits))

    def used(self, use: PromptUse, now: float) -> None:
        """Remember a request until it ends; when there are too many, the end of the oldest is not awaited."""
        self._open[use.id] = use
        if len(self._open) > MOST_OPEN:
            _, oldest = self._open.popitem(last=False)
            self._visits.visit(oldest, Ending(), now)

    def ended(self, request_id: int, ending: Ending, now: float) -> None:
        """Learn from a request, which has ended. O(blocks of its prompt)."""
        use = self._open.pop(request_id, None)
        if use is not None:
            self._visits.visit(use, ending, now)

    def rebuild(self, keys: Sequence[tuple[K, Hint]], now: float) -> None:
        """Hold exactly these keys; what was learned stays if it is whole, who used what last is forgotten."""
        fresh = Visits(self._keys)
        with suppress(ValueError, IndexError, KeyError):  # an exception may have come into the middle of anything
            fresh.restore(self._visits.tables())
        self._keys.clear()
        self._open.clear()
        self._visits = fresh
        super().rebuild(keys, now)

    def worth(self, keys: Sequence[K], now: float) -> list[float]:
        """Return the uses per second, at best, that are to be expected of each key's block."""
        name_of = self._name_of
        return self._visits.worth([key if name_of is None else name_of(key) for key in keys], now)

    def tables(self) -> dict[str, Any]:
        """Return what was learned, for JSON."""
        return self._visits.tables()

    def restore(self, tables: dict[str, Any]) -> None:
        """Take in what `tables` gave. Raises ValueError for anything else."""
        self._visits.restore(tables)

    def beliefs(self, tables: dict[str, Any]) -> list[Belief]:
        """Say what such tables mean, the classes that were seen most first."""
        return beliefs(tables)
