"""Returns: how long sessions stay away between the end of a reply and their next request, by class.

A life table by the logarithm of the gap: how many sessions came to each age without a return, and how many returned at
it. Those that are still away count as far as they have come, so no session has to end before it is learned from
(Kaplan and Meier's estimate, by buckets). A class is the finish reason of the reply and the pace of the session; a rare
class leans on its reason's, and that on all.

No clock of its own; a fixed number of buckets, a bounded number of classes. Under the store's lock.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf, sqrt

FIRST_EDGE_S = 0.25
NUM_BUCKETS = 34
# Ages at which buckets begin, in seconds; the last one, from about 5 hours, has no end.
EDGES_S = (0.0, *(FIRST_EDGE_S * sqrt(2.0) ** i for i in range(NUM_BUCKETS - 1)))
PACES_S = (4.0, 30.0, 240.0)  # last gaps that part four paces: a tool, a reader, a break; guesses
MAX_REASONS = 16  # callers choose the words; those after these count as one
SHRINK = 16.0  # sessions of the wider class that a class begins with
MAX_SEEN = 4096.0  # sessions that a bucket remembers; at more, both of its numbers are halved


@dataclass(frozen=True, slots=True)
class Leaving:
    """The class of a session when a reply has ended: the reply's finish reason, and the session's pace."""

    reason: str = ""
    pace: int = -1

    @property
    def wider(self) -> Leaving | None:
        """The class that this one is part of; None of all."""
        if self.pace >= 0:
            return Leaving(self.reason)
        return Leaving() if self.reason else None


def bucket_of(age_s: float) -> int:
    """Return the bucket of an age in seconds, 0 or more."""
    return bisect_right(EDGES_S, age_s) - 1


class ReturnTable:
    """What is known of returns. Under the store's lock."""

    def __init__(self) -> None:
        self._entered: dict[Leaving, list[float]] = {}
        self._returned: dict[Leaving, list[float]] = {}
        self._reasons: set[str] = set()

    def leaving(self, reason: str, last_gap_s: float | None) -> Leaving:
        """Return the class of a session whose reply ended so; `last_gap_s` is None before its first return."""
        reason = reason or "unknown"
        if reason not in self._reasons:
            if len(self._reasons) >= MAX_REASONS:
                reason = "other"
            self._reasons.add(reason)
        return Leaving(reason, len(PACES_S) + 1 if last_gap_s is None else bisect_right(PACES_S, last_gap_s))

    def stayed(self, leaving: Leaving, first: int, end: int) -> None:
        """A session came to the buckets [first, end) without a return."""
        for which in _widening(leaving):
            entered = self._entered.setdefault(which, [0.0] * NUM_BUCKETS)
            returned = self._returned.setdefault(which, [0.0] * NUM_BUCKETS)
            for bucket in range(first, end):
                entered[bucket] += 1.0
                if entered[bucket] > MAX_SEEN:
                    entered[bucket] /= 2.0
                    returned[bucket] /= 2.0

    def returned(self, leaving: Leaving, bucket: int) -> None:
        """A session that `stayed` to this bucket returned in it."""
        for which in _widening(leaving):
            if which in self._returned:
                self._returned[which][bucket] += 1.0

    def chance(self, leaving: Leaving, age_s: float, start_s: float, end_s: float) -> float:
        """The probability that a session away for `age_s` returns at an age in [start_s, end_s)."""
        hazards = self._hazards(leaving)
        return max(0.0, _survival(hazards, age_s, start_s) - _survival(hazards, age_s, end_s))

    def _hazards(self, leaving: Leaving) -> list[float]:
        """The probability, by bucket, that a session which came to it returns in it."""
        wider = leaving.wider
        prior = [0.0] * NUM_BUCKETS if wider is None else self._hazards(wider)
        entered, returned = self._entered.get(leaving), self._returned.get(leaving)
        if entered is None or returned is None:
            return prior
        return [(r + SHRINK * p) / (e + SHRINK) for r, e, p in zip(returned, entered, prior, strict=True)]


def _widening(leaving: Leaving) -> list[Leaving]:
    found = [leaving]
    while (wider := found[-1].wider) is not None:
        found.append(wider)
    return found


def _survival(hazards: list[float], start_s: float, end_s: float) -> float:
    """The probability to stay away until `end_s` of those that are at `start_s`."""
    left = 1.0
    for bucket in range(bucket_of(start_s), NUM_BUCKETS):
        begins = EDGES_S[bucket]
        ends = EDGES_S[bucket + 1] if bucket + 1 < NUM_BUCKETS else inf
        if begins >= end_s:
            break
        width = (min(ends, end_s) - max(begins, start_s)) / (ends - begins) if ends < inf else 0.0
        left *= (1.0 - hazards[bucket]) ** max(0.0, width)
    return left
