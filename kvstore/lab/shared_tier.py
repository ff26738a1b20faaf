"""A tier that several stores of a simulation share: which pages are in it, and what goes over its wire.

It stands for a Redis cluster: it evicts by itself, what was used longest ago first, and knows the pages by name. It
answers the transfers of planners (`Op`) as a lane's outcomes would, in no time; the load is booked by the second.
"""

from __future__ import annotations

from collections import defaultdict

from kvstore.page import PageKey
from kvstore.plan.records import Op, Transfer
from radix.ordered import OrderedMap


class SharedTier:
    """Room for `num_pages`. read, written: pages by whole seconds of the simulation's clock."""

    def __init__(self, num_pages: int) -> None:
        self.read: defaultdict[int, int] = defaultdict(int)
        self.written: defaultdict[int, int] = defaultdict(int)
        self._num_pages = num_pages
        self._pages: OrderedMap[PageKey, None] = OrderedMap()

    def answer(self, transfer: Transfer, now: float) -> tuple[bool, ...]:
        """Carry out a transfer; return an answer for each of its keys."""
        held = tuple(key in self._pages for key in transfer.keys)
        if transfer.op is Op.PROBE:
            return held
        if transfer.op is Op.DELETE:
            for key in transfer.keys:
                self._pages.pop(key, None)
            return held
        if transfer.op is Op.SPILL:
            self.written[int(now)] += len(transfer.keys) - sum(held)
            held = (True,) * len(held)
        elif transfer.op is Op.FETCH:
            self.read[int(now)] += sum(held)
        for key, is_held in zip(transfer.keys, held, strict=True):
            if is_held:
                self._pages[key] = None
                self._pages.move_to_end(key)
        while len(self._pages) > self._num_pages:
            self._pages.popitem(last=False)
        return held

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: object) -> bool:
        return key in self._pages
