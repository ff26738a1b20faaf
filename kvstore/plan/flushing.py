"""Flushes: whether all that was saved, and all that was deleted, is so on every tier that should have it.

A page that was lost, or a delete that was dropped, is told once to each caller: in its next flush. So a flush speaks of
everything up to now, but for what its caller has been told before. What is still owed is told every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.direction import Direction
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.records import FlushResult, Op

MAX_ROUNDS = 4  # others may go on saving while a flush goes on


@dataclass(slots=True)
class Told:
    """The news that one caller of flushes has had so far, by tier: pages lost, deletes dropped, pages written."""

    lost: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


class Flushing:
    """A flush that goes on. Under the store's lock.

    What a tier has refused is tried once more: a flush is when somebody wants it there.
    """

    def __init__(self, tiers: Sequence[LowerTier]) -> None:
        self._tiers = tiers
        self._has_retried = False
        self._num_rounds = 0

    def is_over(self, now: float) -> bool:
        """True if nothing is under way, and nothing that is owed can be sent now. Ask after every change."""
        # Also what an exclusive tier would get only when it leaves host memory. Where that is full, such writes push
        # out copies of pages that host memory has, which are owed once more then; it ends, as what is written stays.
        while self._num_rounds < MAX_ROUNDS and self._is_settled(now) and any(tier.debts.aside for tier in self._tiers):
            self._num_rounds += 1
            for tier in self._tiers:
                tier.debts.hurry()
                tier.pump(now)
        if not self._is_settled(now):
            return False
        if not self._has_retried:
            self._has_retried = True
            for tier in self._tiers:
                tier.retry(now)
        return self._is_settled(now)

    def _is_settled(self, now: float) -> bool:
        return all(tier.is_settled(now) for tier in self._tiers)


def told_of(tiers: Sequence[LowerTier]) -> Told:
    """The notes of a caller that begins now: what was lost before is not its own."""
    told = Told()
    report(tiers, told)
    return told


def report(tiers: Sequence[LowerTier], told: Told) -> FlushResult:
    """The state now; `told` notes that its caller knows. Under the store's lock; walks over no page."""
    written: dict[str, int] = {}
    missing: dict[str, dict[str, int]] = {}
    undeleted: dict[str, dict[str, int]] = {}
    for tier in tiers:
        name, debts, deletes = tier.plan.name, tier.debts, tier.deletes
        owed = "out" if not tier.takes(Direction.WRITE) else "budget" if tier.is_spent else "waiting"
        pages = {
            owed: debts.num_owed_saves + _num_flying_saves(tier),
            "refused": debts.num_failed_saves,
            "lost": debts.num_lost_saves - told.lost.get(name, 0),
        }
        keys = {
            "waiting" if tier.takes(Direction.DELETE) else "out": len(deletes),
            "dropped": deletes.num_dropped - told.dropped.get(name, 0),
        }
        for found, counts in ((missing, pages), (undeleted, keys)):
            counts = {why: num for why, num in counts.items() if num}
            if counts:
                found[name] = counts
        written[name] = tier.counters.spilled_pages - told.written.get(name, 0)
        told.lost[name] = debts.num_lost_saves
        told.dropped[name] = deletes.num_dropped
        told.written[name] = tier.counters.spilled_pages
    return FlushResult(not missing and not undeleted, written, missing, undeleted)


def _num_flying_saves(tier: LowerTier) -> int:
    if not tier.in_flight:
        return 0
    return sum(
        len(flight.pages) - (len(flight.context) if isinstance(flight.context, frozenset) else 0)
        for flight in tier.transfers.under_way()
        if flight.transfer.op is Op.SPILL and flight.transfer.tier == tier.plan.name
    )
