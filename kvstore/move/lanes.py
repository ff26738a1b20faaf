"""What is told of the lanes of a mover, by everything that stands before one: tiers, breakers, counters."""

from __future__ import annotations

from kvstore.move.counters import LaneCounters
from kvstore.move.mover import Mover
from kvstore.plan.records import Op
from kvstore.tiers.base import Tier, TierCounters


class Lanes:
    """The lanes of one mover, by the names of their tiers. Any thread; an unknown name is a KeyError."""

    _mover: Mover

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names, in the order in which lanes were given."""
        return tuple(self._mover.lanes)

    def takes(self, tier: str, op: Op) -> bool:
        """False while a breaker keeps transfers of this kind out."""
        return self._mover.lanes[tier].directions.allows(op)

    def num_opened(self, tier: str) -> int:
        """How often the tier, or a direction of it, was taken out."""
        return self._mover.lanes[tier].directions.num_opened

    def lane_counters(self, tier: str) -> LaneCounters:
        """The counters of the tier's lane."""
        return self._mover.lanes[tier].counters

    def tier_counters(self, tier: str) -> TierCounters:
        """The counters that only the tier itself has."""
        return self.tier(tier).counters

    def tier(self, name: str) -> Tier:
        """The tier itself."""
        return self._mover.lanes[name].tier
