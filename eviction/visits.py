"""Visits: who used which blocks last, and what that says about their next use.

A *visit* is one request's use of its prompt's blocks, told when the request ends, resident or not. Blocks that a visit
was the last to use, of one class, are a *cohort* of its path: one record with a time, a class and a worth, so that
millions of blocks cost a few records a visit. The class says how often the blocks were used, how the reply ended, how
soon after the turn before this one came, and how long the reply was (all of it where it is known); what a class is
worth is learned (survival.py) from what becomes of its cohorts. A turn continues the visit that used
the deepest known block of its path last, if it has nearly all of that visit's path.

A long request is not more evidence than a short one: its blocks are used again together, so each counts the less the
more they are. Of what left the cache GHOSTS times as many blocks are remembered as were resident at one time.

Blocks are small numbers here, the caller's (outlook.py). This is the twin, in plain Python, of what is compiled
(_visits.h), for machines without a compiler: both name the same victims, which tests hold them to. It is 20 times
slower.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import groupby
from math import inf
from operator import itemgetter

from eviction.survival import EDGES, NUM_AGES, ONE_OBSERVATION, Counts, Survival, age_of
from radix.ordered import OrderedMap

UPDATE_VISITS = 16  # between updates of a part of the tables
REQUEST_WEIGHT = 8  # observations that all blocks of a request count together; of 1..24 best on most traces
GHOSTS = 4  # blocks remembered for each that was resident at one time
LEAST_GHOSTS = 4096
SHORT_BY = 2  # blocks that a turn may lack of what it continues: the last one is filled in part, and an engine's last
MOST_COUNT = 63
MOST_REASONS = 6  # finish reasons told apart
UNKNOWN = -1

# Features of a class; their values follow.
OF_PACE, OF_REASON, OF_REPLY, OF_USES = 0, 100, 200, 500
LAST_TURN, GOES_ON = 400, 401
NEW, BRANCH = 7, 6  # paces of what continues no visit
# Limits of ranks, each of which it belongs to itself.
PACES_S = (5.0, 15.0, 45.0, 120.0, 400.0)
USES = (1, 2, 4, 8, 32)
REPLIES = (16, 64, 160, 320, 640)  # tokens
_EDGES: list[float] = EDGES.tolist()


class Cohort:
    """Blocks that one visit was the last to use, neighbours on its path and of one class.

    number:   younger cohorts have higher ones.
    weight:   of a block as an observation; 0 where no visit has told of them.
    resident: those that the policy holds, with their depth. live: how many there are, resident or not.
    above, deeper: cohorts of the same visit.
    size:     blocks of the visit's path, 0 where none has told of them.
    """

    __slots__ = ("above", "age", "cls", "deeper", "live", "number", "resident", "size", "time", "weight")

    def __init__(self, number: int, time: float, cls: int, weight: int, size: int) -> None:
        self.number, self.time, self.cls, self.age = number, time, cls, 0
        self.weight, self.size = weight, size
        self.resident: dict[int, int] = {}
        self.live = 0
        self.above: Cohort | None = None
        self.deeper: Cohort | None = None

    @property
    def cell(self) -> tuple[int, int]:
        """Class and age: cohorts of one cell are worth the same."""
        return self.cls, self.age

    @property
    def due(self) -> float:
        """The time at which it comes of the next age."""
        return self.time + _EDGES[self.age + 1] if self.age < NUM_AGES - 1 else inf


class Visits:
    """Every block that is remembered, and its cohort. Not thread-safe."""

    def __init__(self, least_ghosts: int = LEAST_GHOSTS) -> None:
        self._survival = Survival()
        self._num_visits = 0
        self._least_ghosts = least_ghosts
        self._most_resident = self._num_resident = 0
        self._now = self._told_at = 0.0
        self._last_number = 0
        self._known: dict[int, tuple[Cohort, int, int]] = {}  # of a block: cohort, uses, depth
        self._ghosts: OrderedMap[int, None] = OrderedMap()  # known, not resident; left longest ago first
        self._forgotten: list[int] = []
        self._by_number: dict[int, Cohort] = {}
        self._cells: dict[tuple[int, int], set[int]] = {}  # numbers of the cohorts with resident blocks
        self._due: list[tuple[float, int]] = []  # a heap: when each cohort comes of the next age

    @property
    def num_remembered(self) -> int:
        """Blocks that are resident or remembered."""
        return len(self._known)

    @property
    def num_cohorts(self) -> int:
        """Cohorts of these blocks."""
        return len(self._by_number)

    def visit(self, blocks: list[int], now: float, reason: int, last_turn: int, reply_tokens: int) -> list[int]:
        """Book a request that has ended; return blocks that are forgotten. O(blocks of its prompt).

        reason: a number for each finish reason. last_turn: 0 or 1. UNKNOWN where it is not known.
        """
        self.advance(now)
        known = self._num_known(blocks)
        features = self._features(
            blocks[known - 1] if known else UNKNOWN, known, self._now, reason, last_turn, reply_tokens
        )
        weight = int(REQUEST_WEIGHT * ONE_OBSERVATION / max(len(blocks), REQUEST_WEIGHT))
        cohort: Cohort | None = None
        at = 0
        while at < len(blocks):
            before, count, _ = self._known.get(blocks[at], (None, 0, 0))
            if before is not None and before is cohort:  # a path that names a block twice
                at += 1
                continue
            uses = min(count + 1, MOST_COUNT)
            cls = self._survival.class_of((_feature_of_uses(count), *features))
            if cohort is None or cohort.cls != cls:
                above, cohort = cohort, self._new(cls, weight, len(blocks))
                cohort.above = above
                if above is not None:
                    above.deeper = cohort
            num, num_resident = 0, 0
            while at < len(blocks) and self._is_of(blocks[at], before, count):
                num += 1
                num_resident += self._join(blocks[at], before, cohort, uses, at)
                at += 1
            self._survival.count(cls, 0, 0, num * weight)
            if before is not None:
                self._survival.count(before.cls, before.age, num * before.weight, 0)
                self._settle(before)
                self._part(before, num)
            cohort.live += num
            self._settle(cohort)
        self._trim()
        self._num_visits += 1
        if self._num_visits % UPDATE_VISITS == 0:
            self._survival.update()
        return self._take_forgotten()

    def arrive(self, blocks: list[int]) -> None:
        """Blocks, root first, became resident. Those that no visit has told of are the newest cohort of their own."""
        fresh: Cohort | None = None
        for at, block in enumerate(blocks):
            known = self._known.get(block)
            if known is None:
                fresh = fresh or self._new(0, 0, 0)
                known = self._known[block] = fresh, 0, at
                fresh.live += 1
            elif block in known[0].resident:
                continue
            else:
                del self._ghosts[block]
            known[0].resident[block] = known[2]
            self._num_resident += 1
            self._settle(known[0])
        self._most_resident = max(self._most_resident, self._num_resident)

    def touch(self, blocks: list[int]) -> None:
        """Resident blocks, root first, were used: those that no visit has told of are the newest of these again."""
        fresh: Cohort | None = None
        for at, block in enumerate(blocks):
            before = self._known[block][0] if block in self._known else None
            if before is None or before.size or before is fresh or block not in before.resident:
                continue
            fresh = fresh or self._new(0, 0, 0)
            del before.resident[block]
            self._settle(before)
            self._part(before, 1)
            self._known[block] = fresh, 0, at
            fresh.live += 1
            fresh.resident[block] = at
            self._settle(fresh)

    def leave(self, blocks: list[int]) -> list[int]:
        """Blocks are not resident any more; return those that are forgotten: no visit has told of them."""
        for block in blocks:
            cohort = self._known[block][0] if block in self._known else None
            if cohort is None or cohort.resident.pop(block, None) is None:
                continue
            self._num_resident -= 1
            self._settle(cohort)
            self._ghosts[block] = None
            if not cohort.size:
                self._forget(block)
        return self._take_forgotten()

    def victims(self, n: int) -> list[int]:
        """Return up to `n` resident blocks, the least worth first; of one visit's cohorts the deepest first."""
        found: list[int] = []
        seen: set[int] = set()
        worth = self._survival.worth
        cells = sorted((float(worth[cell]), cell) for cell in self._cells)
        for _, group in groupby(cells, key=itemgetter(0)):
            for number in sorted(number for _, cell in group for number in self._cells[cell]):
                for part in _deepest_first(self._by_number[number]):
                    if part.number not in seen:
                        seen.add(part.number)
                        found += sorted(part.resident, key=part.resident.__getitem__, reverse=True)
                if len(found) >= n:
                    return found[: max(n, 0)]
        return found

    def worth(self, blocks: list[int], now: float) -> list[float]:
        """Return what blocks are worth at a time; one that is not remembered is worth what the least known kind is."""
        worth, found = self._survival.worth, []
        at = self._time_at(now)
        for block in blocks:
            cohort = self._known[block][0] if block in self._known else None
            found.append(float(worth[0, 0] if cohort is None else worth[cohort.cls, age_of(at - cohort.time)]))
        return found

    def prospects(self, last: int, num_known: int, blocks: list[int], now: float, last_turn: int) -> list[float]:
        """Return what blocks will be worth when a request that comes now has used them, by what is known now.

        num_known: leading blocks of its prompt that are remembered; last: the last of them, of no account for none.
        Raises ValueError if that one is not remembered.
        """
        if num_known and last not in self._known:
            raise ValueError(f"{last} is no block that is remembered")
        features = self._features(last, num_known, self._time_at(now), UNKNOWN, last_turn, UNKNOWN)
        counts = [self._known[block][1] if block in self._known else 0 for block in blocks]
        classes = {count: self._survival.seen_class_of((_feature_of_uses(count), *features)) for count in set(counts)}
        return [float(self._survival.worth[classes[count], 0]) for count in counts]

    def advance(self, now: float) -> None:
        """Time goes on: cohorts come of the next age, and have waited as long."""
        self._now = self._time_at(now)
        self._told_at = now
        while self._due and self._due[0][0] <= self._now:
            cohort = self._by_number.get(heappop(self._due)[1])
            if cohort is None:
                continue
            before = cohort.cell
            while cohort.due <= self._now:
                cohort.age += 1
                self._survival.count(cohort.cls, cohort.age, 0, cohort.live * cohort.weight)
            if cohort.resident:
                self._leave_cell(cohort.number, before)
                self._cells.setdefault(cohort.cell, set()).add(cohort.number)
            self._await(cohort)

    def counts(self) -> Counts:
        """Return what was learned."""
        return self._survival.counts()

    def restore(self, classes: list[list[int]], events: bytes, at_risk: bytes) -> None:
        """Take in what `counts` gave; into visits that are new only."""
        self._survival.restore(classes, events, at_risk)

    def _time_at(self, now: float) -> float:
        """The time, as cohorts count it, of a moment by the caller's clock: one that is set back stands still here."""
        return self._now + (max(now - self._told_at, 0.0) if self._num_visits else 0.0)

    def _num_known(self, blocks: Sequence[int]) -> int:
        """Leading blocks that are remembered: by halves, since who knows a block mostly knows all before it."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in self._known:
                low = middle + 1
            else:
                high = middle
        return low

    def _features(self, last: int, known: int, time: float, reason: int, last_turn: int, reply: int) -> tuple[int, ...]:
        """The features of a visit at a time, but for the number of uses, which is the first of a class.

        known: leading blocks that are remembered; last: the last of them.
        """
        pace = NEW
        if known:
            before = self._known[last][0]
            pace = BRANCH
            if before.size and known >= max(2, before.size - SHORT_BY):
                pace = _rank(time - before.time, PACES_S)
        features = []
        if last_turn != UNKNOWN:
            features.append(LAST_TURN if last_turn else GOES_ON)
        if reason != UNKNOWN:
            features.append(OF_REASON + reason)
        features.append(OF_PACE + pace)
        if reply != UNKNOWN:
            features.append(OF_REPLY + _rank(reply, REPLIES))
        return tuple(features)

    def _is_of(self, block: int, cohort: Cohort | None, count: int) -> bool:
        known = self._known.get(block)
        return cohort is None if known is None else known[0] is cohort and known[1] == count

    def _join(self, block: int, before: Cohort | None, cohort: Cohort, uses: int, depth: int) -> int:
        """A block comes to a cohort; return 1 if it is resident."""
        self._known[block] = cohort, uses, depth
        if before is not None and block in before.resident:
            del before.resident[block]
            cohort.resident[block] = depth
            return 1
        self._ghosts[block] = None
        self._ghosts.move_to_end(block)
        return 0

    def _settle(self, cohort: Cohort) -> None:
        """A cohort is in its cell while it has resident blocks."""
        if cohort.resident:
            self._cells.setdefault(cohort.cell, set()).add(cohort.number)
        elif cohort.number in self._cells.get(cohort.cell, ()):
            self._leave_cell(cohort.number, cohort.cell)

    def _leave_cell(self, number: int, cell: tuple[int, int]) -> None:
        self._cells[cell].remove(number)
        if not self._cells[cell]:
            del self._cells[cell]

    def _await(self, cohort: Cohort) -> None:
        if cohort.due < inf:
            heappush(self._due, (cohort.due, cohort.number))

    def _new(self, cls: int, weight: int, size: int) -> Cohort:
        self._last_number += 1
        cohort = self._by_number[self._last_number] = Cohort(self._last_number, self._now, cls, weight, size)
        self._await(cohort)
        return cohort

    def _part(self, cohort: Cohort, num: int) -> None:
        """Blocks are of a cohort no more."""
        cohort.live -= num
        if not cohort.live:
            del self._by_number[cohort.number]
            if cohort.above is not None:
                cohort.above.deeper = cohort.deeper
            if cohort.deeper is not None:
                cohort.deeper.above = cohort.above

    def _forget(self, block: int) -> None:
        """Forget a block that is not resident."""
        del self._ghosts[block]
        cohort = self._known.pop(block)[0]
        self._forgotten.append(block)
        self._part(cohort, 1)

    def _trim(self) -> None:
        """Forget what left longest ago."""
        excess = len(self._ghosts) - max(GHOSTS * self._most_resident, self._least_ghosts)
        for _ in range(max(excess, 0)):
            self._forget(next(iter(self._ghosts)))

    def _take_forgotten(self) -> list[int]:
        forgotten, self._forgotten = self._forgotten, []
        return forgotten


def _deepest_first(cohort: Cohort) -> list[Cohort]:
    parts = [cohort]
    while parts[-1].deeper is not None:
        parts.append(parts[-1].deeper)
    parts.reverse()
    return parts


def _feature_of_uses(count: int) -> int:
    """The first feature of a class: of blocks that were used so often before."""
    return OF_USES + _rank(min(count + 1, MOST_COUNT), USES)


def _rank(value: float, limits: Sequence[float]) -> int:
    """Return how many of the limits are below a value."""
    return bisect_left(limits, value)
