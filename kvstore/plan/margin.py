"""The margin of host memory: the pages that leave it next, written ahead to exclusive tiers.

An exclusive tier is for what host memory does not have: a page is written when it is about to leave host memory, and
where the tier needs room, the copies of pages that are back in host memory leave first. Room in host memory is made at
once, by dropping, and cannot wait for a write. So the coldest pages, an eighth of the slots, are written ahead of that;
they stay until their slots are needed. What leaves in one go beyond the margin, and has no copy, is lost to the tier,
and counted.
"""

from __future__ import annotations

from kvstore.direction import Direction
from kvstore.plan.books import Books

SHARE = 8  # one of so many slots; a guess


class Margin:
    """Has the next victims of host memory written. Under the store's lock."""

    def __init__(self, books: Books) -> None:
        self._host = books.host
        self._tiers = books.tiers
        self._num_ahead = 0  # pages that were looked at last; as many may leave before it is looked again
        self._num_evicted = 0  # by then

    def keep(self, now: float) -> None:
        """Look whether more has to be written ahead. Amortised O(1) per page that left host memory since."""
        tiers = [tier for tier in self._tiers if tier.plan.exclusive and tier.takes(Direction.WRITE)]
        if not tiers:
            return
        host = self._host
        size = max(1, host.pool.num_in_use // SHARE)
        left = host.pool.num_free + max(0, self._num_ahead - (host.evicted_pages - self._num_evicted))
        if 2 * left >= size:
            return
        victims = host.policy.victims(size)
        for tier in tiers:
            tier.debts.hurry(victims)
            tier.pump(now)
        self._num_ahead, self._num_evicted = len(victims), host.evicted_pages
