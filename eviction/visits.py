"""Visits: who used which blocks last, and what that says about their next use.

A *visit* is one request's use of its prompt's blocks, told when the request ends, resident or not. Blocks that a visit
was the last to use, of one class, are a *cohort* of its path: one record with a time, a class and a worth, so that
millions of blocks cost a few records a visit. The class says how often the blocks were used, how the reply ended, how
soon after the turn before this one came, how long the reply was, and which turn it was (all of it where it is known);
what a class is worth is learned (survival.py) from what becomes of its cohorts. A turn continues the visit that used
the deepest known block of its path last, if it has nearly all of that visit's path.

A long request is not more evidence than a short one: its blocks are used again together, so each counts the less the
more they are. What left the cache is remembered for as long as GHOSTS times as many blocks were used since.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Container, Hashable, Sequence
from itertools import groupby, repeat
from typing import Any

import numpy as np

from eviction.policy import Ending, PromptUse
from eviction.survival import Survival, age_of, ages_of
from radix.ordered import OrderedMap

REQUEST_WEIGHT = 4.0  # observations that all blocks of a request count together
GHOSTS = 4  # blocks remembered for each that was resident at one time
LEAST_GHOSTS = 4096
FIRST_SLOTS = 64  # cohorts that there is room for at first
UPDATE_VISITS = 16  # between updates of a part of the tables
SHORT_BY = 2  # blocks that a turn may lack of what it continues: the last one is filled in part, and an engine's last
MOST_REASONS = 6  # finish reasons told apart

NEW, BRANCH = 7, 6  # paces of what continues no visit
# Limits of ranks, each of which it belongs to itself.
PACES_S = (5.0, 15.0, 45.0, 120.0, 400.0)
USES = (1, 2, 4, 8, 32)
REPLIES = (16, 64, 160, 320, 640)  # tokens
TURNS = (0, 1, 3, 8)
_COUNT_BITS = 6
_MOST_COUNT = (1 << _COUNT_BITS) - 1


class Cohort:
    """Blocks that one visit was the last to use, neighbours on its path and of one class.

    names:    root first. depth: of the first of them.
    deeper:   the next cohort of the same visit.
    size:     blocks of the visit's path; turn: its number in its conversation.
    resident: blocks of it that the policy holds. live: blocks that it is the last to have used.
    top:      no block of it from here on is resident, as far as was looked.
    slot:     its place in the arrays of `Visits`.
    """

    __slots__ = ("deeper", "depth", "live", "names", "number", "resident", "size", "slot", "time", "top", "turn")

    def __init__(self, number: int, depth: int, time: float) -> None:
        self.number = number
        self.names: list[Hashable] = []
        self.depth = depth
        self.time = time
        self.deeper: Cohort | None = None
        self.size = 0
        self.turn = 0
        self.live = 0
        self.resident = 0
        self.top = 0
        self.slot = -1


class Visits:
    """Every block that is remembered, and its cohort. Not thread-safe.

    resident: says of a block's name whether the policy holds it.
    survival: what was learned. num_visits: how many were told. version: grows when the order may be another one.
    """

    def __init__(self, resident: Container[Hashable]) -> None:
        self.survival = Survival()
        self.num_visits = 0
        self.version = 0
        self._resident_names = resident
        self._num_resident = 0
        self._most_resident = 0
        self._now = 0.0
        # name -> number of its cohort, and its uses; used longest ago first
        self._uses: OrderedMap[Hashable, int] = OrderedMap()
        self._by_number: dict[int, Cohort] = {}
        self._last_number = 0
        self._reasons: dict[str, int] = {}
        # By slot: a cohort, and what is computed of all at once.
        self._cohorts: list[Cohort | None] = [None] * FIRST_SLOTS
        self._free = list(range(FIRST_SLOTS))
        self._numbers = np.zeros(FIRST_SLOTS, np.intp)
        self._times = np.zeros(FIRST_SLOTS)
        self._classes = np.zeros(FIRST_SLOTS, np.intp)
        self._ages = np.zeros(FIRST_SLOTS, np.intp)  # as far as their waiting is counted
        self._waiting = np.zeros(FIRST_SLOTS)  # blocks not used since
        self._weights = np.zeros(FIRST_SLOTS)
        self._resident = np.zeros(FIRST_SLOTS, np.intp)

    def visit(self, use: PromptUse, ending: Ending, now: float) -> None:
        """Book a request that has ended. O(blocks of its prompt)."""
        self._now = now
        names = use.path
        features, turn = self._features(use, ending, now)
        weight = min(1.0, REQUEST_WEIGHT / max(len(names), 1))
        cohort: Cohort | None = None
        depth = 0
        codes: list[int] = []
        for code, group in groupby(map(self._uses.get, names)):
            run = names[depth : depth + sum(1 for _ in group)]
            count = 1
            if code is not None:
                count = min((code & _MOST_COUNT) + 1, _MOST_COUNT)
                self._reuse(self._by_number[code >> _COUNT_BITS], run, now)
            cls = self.survival.class_of((500 + _rank(count, USES), *features))
            if cohort is None or self._classes[cohort.slot] != cls:
                above, cohort = cohort, self._new(depth, now)
                cohort.size, cohort.turn = len(names), turn
                self._classes[cohort.slot], self._weights[cohort.slot] = cls, weight
                if above is not None:
                    above.deeper = cohort
            cohort.names += run
            cohort.live += len(run)
            self._waiting[cohort.slot] += len(run)
            self.survival.reached(cls, 0, 1, len(run) * weight)
            self._change(cohort, sum(map(self._resident_names.__contains__, run)))
            codes += repeat((cohort.number << _COUNT_BITS) | count, len(run))
            depth += len(run)
        self._uses.update(dict(zip(names, codes, strict=True)))
        deque(map(self._uses.move_to_end, names), maxlen=0)
        self._trim()
        self.num_visits += 1
        self.version += 1
        if self.num_visits % UPDATE_VISITS == 0:
            self._catch_up_all(now)
            self.survival.update()

    def arrive(self, names: Sequence[Hashable]) -> None:
        """Blocks, root first, became resident. Those that no visit has told of are the newest cohort of their own."""
        self._forget_untold(names)
        end = len(names)
        for code, group in groupby(map(self._uses.get, reversed(names))):  # the deepest is the oldest
            run = names[end - sum(1 for _ in group) : end]
            end -= len(run)
            if code is None:
                cohort = self._new(0, self._now)
                cohort.names += run
                cohort.live = len(run)
                self._uses.update(dict.fromkeys(run, cohort.number << _COUNT_BITS))
            else:
                cohort = self._by_number[code >> _COUNT_BITS]
            self._change(cohort, len(run))
        self._most_resident = max(self._most_resident, self._num_resident)
        self._trim()

    def touch(self, names: Sequence[Hashable]) -> None:
        """Resident blocks, root first, were used: those that no visit has told of are the newest of these again."""
        untold = [name for name in names if not self._by_number[self._uses[name] >> _COUNT_BITS].size]
        self.leave(untold)
        self.arrive(untold)

    def leave(self, names: Sequence[Hashable]) -> None:
        """Blocks are not resident any more."""
        for code, group in groupby(map(self._uses.get, names)):
            if code is not None:
                self._change(self._by_number[code >> _COUNT_BITS], -sum(1 for _ in group))

    def is_last(self, cohort: Cohort, name: Hashable) -> bool:
        """Whether it was this cohort that used a block last."""
        code = self._uses.get(name)
        return code is not None and code >> _COUNT_BITS == cohort.number

    def worth(self, names: Sequence[Hashable], now: float) -> list[float]:
        """Return what each block is worth; one that is not remembered is worth what the least known kind is."""
        index, found = self.survival.index, []
        for name in names:
            code = self._uses.get(name)
            cohort = None if code is None else self._by_number[code >> _COUNT_BITS]
            cls = 0 if cohort is None else int(self._classes[cohort.slot])
            found.append(float(index[cls, 0 if cohort is None else age_of(now - cohort.time)]))
        return found

    def least_worth(self, num_blocks: int) -> list[Cohort]:
        """Return cohorts with resident blocks, least worth first: enough for so many blocks, if there are."""
        slots = np.nonzero(self._resident)[0]
        times = self._times[slots]
        worth = self.survival.index[self._classes[slots], ages_of(self._now - times)]
        order = slots[np.lexsort((self._numbers[slots], times, worth))]
        enough = int(np.searchsorted(np.cumsum(self._resident[order]), num_blocks)) + 1
        return [cohort for slot in order[:enough].tolist() if (cohort := self._cohorts[slot]) is not None]

    def tables(self) -> dict[str, Any]:
        """Return what was learned, for JSON."""
        return self.survival.tables() | {"finish_reasons": dict(self._reasons)}

    def restore(self, tables: dict[str, Any]) -> None:
        """Take in what `tables` gave. Raises ValueError for anything else."""
        reasons = tables.get("finish_reasons")
        if not isinstance(reasons, dict) or not all(
            isinstance(reason, str) and type(code) is int and 0 <= code <= MOST_REASONS
            for reason, code in reasons.items()
        ):
            raise ValueError("not a policy's tables: finish_reasons must say which number stands for which reason")
        self.survival.restore(tables)
        self._reasons = dict(reasons)

    def _forget_untold(self, names: Sequence[Hashable]) -> None:
        for name, code in zip(names, list(map(self._uses.get, names)), strict=True):
            if code is not None:
                cohort = self._by_number[code >> _COUNT_BITS]
                if not cohort.size:
                    del self._uses[name]
                    self._part(cohort, 1)

    def _num_known(self, names: Sequence[Hashable]) -> int:
        """Leading blocks that are remembered: by halves, since who knows a block mostly knows all before it."""
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) // 2
            if names[middle] in self._uses:
                low = middle + 1
            else:
                high = middle
        return low

    def _features(self, use: PromptUse, ending: Ending, now: float) -> tuple[tuple[int, ...], int]:
        """The features of a visit beside the number of uses, and which turn it is."""
        known = self._num_known(use.path)
        pace, turn = NEW, 0
        if known:
            before = self._by_number[self._uses[use.path[known - 1]] >> _COUNT_BITS]
            pace = BRANCH
            if before.size and known >= max(2, before.size - SHORT_BY):
                pace, turn = _rank(now - before.time, PACES_S), before.turn + 1
        features = []
        if ending.last_turn or (use.last_turn and ending.last_turn is None):
            features.append(400)
        if ending.finish_reason:
            features.append(100 + self._number_of(ending.finish_reason))
        features.append(pace)
        if ending.reply_tokens >= 0:
            features.append(200 + _rank(ending.reply_tokens, REPLIES))
        features.append(300 + _rank(turn, TURNS))
        return tuple(features), turn

    def _number_of(self, reason: str) -> int:
        """The number of a finish reason; callers choose the words, so those after MOST_REASONS share one."""
        if reason not in self._reasons:
            if len(self._reasons) >= MOST_REASONS:
                return MOST_REASONS
            self._reasons[reason] = len(self._reasons)
        return self._reasons[reason]

    def _reuse(self, cohort: Cohort, run: Sequence[Hashable], now: float) -> None:
        """Blocks of a cohort were used again: they leave it."""
        slot, weight = cohort.slot, float(self._weights[cohort.slot])
        if weight:
            age = age_of(now - cohort.time)
            if age > self._ages[slot]:
                self.survival.reached(
                    int(self._classes[slot]), int(self._ages[slot]) + 1, age + 1, float(self._waiting[slot]) * weight
                )
                self._ages[slot] = age
            self.survival.used(int(self._classes[slot]), age, len(run) * weight)
            self._waiting[slot] -= len(run)
        self._change(cohort, -sum(map(self._resident_names.__contains__, run)))
        self._part(cohort, len(run))

    def _catch_up_all(self, now: float) -> None:
        """Count the waiting of every cohort up to now."""
        slots = np.nonzero(self._waiting * self._weights)[0]
        ages = ages_of(now - self._times[slots])
        while len(slots):
            more = self._ages[slots] < ages
            slots, ages = slots[more], ages[more]
            self._ages[slots] += 1
            self.survival.waited(self._classes[slots], self._ages[slots], self._waiting[slots] * self._weights[slots])

    def _trim(self) -> None:
        """Forget what was used longest ago, and is not resident."""
        excess = len(self._uses) - max(GHOSTS * self._most_resident, LEAST_GHOSTS)
        for _ in range(max(excess, 0)):
            name, code = self._uses.popitem(last=False)
            if name in self._resident_names:  # it is of use to somebody: once more around
                self._uses[name] = code
                continue
            cohort = self._by_number[code >> _COUNT_BITS]
            self._waiting[cohort.slot] = max(self._waiting[cohort.slot] - 1, 0)
            self._part(cohort, 1)

    def _part(self, cohort: Cohort, num: int) -> None:
        cohort.live -= num
        if not cohort.live:
            slot = cohort.slot
            self._cohorts[slot] = None
            for array in (self._waiting, self._weights, self._resident):
                array[slot] = 0
            self._free.append(slot)
            del self._by_number[cohort.number]

    def _new(self, depth: int, now: float) -> Cohort:
        if not self._free:
            self._grow()
        self._last_number += 1
        cohort = Cohort(self._last_number, depth, now)
        slot = cohort.slot = self._free.pop()
        self._cohorts[slot] = self._by_number[cohort.number] = cohort
        self._numbers[slot], self._times[slot], self._classes[slot], self._ages[slot] = cohort.number, now, 0, 0
        return cohort

    def _grow(self) -> None:
        num = len(self._cohorts)
        self._cohorts += [None] * num
        self._free += range(num, 2 * num)
        for name in ("_numbers", "_times", "_classes", "_ages", "_waiting", "_weights", "_resident"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array))))

    def _change(self, cohort: Cohort, num: int) -> None:
        """So many more blocks of a cohort are resident."""
        if num:
            if not cohort.resident:
                self.version += 1
            cohort.resident += num
            self._resident[cohort.slot] += num
            self._num_resident += num
            if num > 0:
                cohort.top = len(cohort.names)


def _rank(value: float, limits: Sequence[float]) -> int:
    """Return how many of the limits are below a value."""
    return bisect_left(limits, value)
