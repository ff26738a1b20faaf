"""Outcomes of transfers: each is booked by the part that had the transfer sent.

A transfer that landed already, or was never sent, is ignored.
"""

from __future__ import annotations

from kvstore.plan.catalog import Catalog
from kvstore.plan.cost import CostModel
from kvstore.plan.loads import Loader
from kvstore.plan.lookup import Scout
from kvstore.plan.lower_tier import LowerTier
from kvstore.plan.lower_tiers import TierBook
from kvstore.plan.records import Op, Outcome
from kvstore.plan.retention import Retention
from kvstore.plan.single_flight import Turns
from kvstore.plan.state import PageState
from kvstore.plan.transfers import Flight, Flights


class Outcomes:
    """Hands outcomes on. Under the store's lock."""

    def __init__(
        self,
        catalog: Catalog,
        flights: Flights,
        book: TierBook,
        costs: CostModel,
        scout: Scout,
        loader: Loader,
        turns: Turns,
        retention: Retention,
    ) -> None:
        self._catalog = catalog
        self._flights = flights
        self._book = book
        self._costs = costs
        self._scout = scout
        self._loader = loader
        self._turns = turns
        self._retention = retention

    def book(self, outcome: Outcome, now: float) -> None:
        """Book what became of a transfer."""
        flight = self._flights.land(outcome.transfer_id)
        if flight is None:
            return
        tier = self._book.named(flight.transfer.tier)
        if outcome.error is None and outcome.seconds > 0 and flight.transfer.op in (Op.FETCH, Op.PROBE):
            self._costs.tiers[tier.plan.name].observe(outcome.seconds, outcome.num_bytes, now)
        match flight.transfer.op:
            case Op.FETCH:
                self._fetched(tier, flight, outcome, now)
            case Op.SPILL:
                tier.spilled(flight, outcome, now)
                self._retention.drop_idle(flight.pages)
            case Op.PROBE:
                self._scout.answered(flight, outcome)
                self._loader.resume_prefetches(now)
            case Op.TOUCH:
                tier.touched(flight, outcome, now)
            case Op.DELETE | Op.CLEAR:
                tier.deleted(flight, outcome, now)
            case Op.CLAIM:
                self._turns.answered(flight, outcome, now)
            case Op.UNCLAIM:
                pass  # what could not be taken back expires

    def _fetched(self, tier: LowerTier, flight: Flight, outcome: Outcome, now: float) -> None:
        self._loader.fetched(tier, flight, outcome, now)
        arrived = [page for page in flight.pages if page.state == PageState.READY and not page.block.is_removed]
        for other in self._book.all:
            if other is not tier and arrived:
                other.owe(arrived, used=True)
                other.pump(now)
        self._retention.drop_idle(flight.pages)
        if len(arrived) < len(flight.pages):
            for page in reversed(flight.pages):
                self._catalog.prune(page.block)
