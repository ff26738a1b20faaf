"""Promises to keep blocks in host memory: pins of an operator, and "retain until" of a request.

A kept block holds one pin on each of its resident pages, whatever the number of reasons; the latest deadline counts.
A promise is about pages that are in host memory: it does not bring any there.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from kvstore.plan.catalog import Block, PageState
from kvstore.plan.hostspace import HostSpace


class Keeper:
    """Who is kept, and until when (planner's clock; inf for a pin)."""

    def __init__(self, host: HostSpace, wall_offset: float) -> None:
        self._host = host
        self._until: dict[Block, float] = {}
        self._queue: list[tuple[float, int, Block]] = []
        self._order = count()
        self.wall_offset = wall_offset

    def keep(self, blocks: Sequence[Block], until: float) -> int:
        """Hold the resident pages of blocks; returns the number of blocks that hold any."""
        kept = 0
        for block in blocks:
            held = False
            for page in block.pages:
                if page.state == PageState.READY and not page.kept:
                    page.kept = True
                    self._host.pin(page)
                held = held or page.kept
            if held:
                kept += 1
                if until > self._until.get(block, float("-inf")):
                    self._until[block] = until
                    if until != float("inf"):
                        heappush(self._queue, (until, next(self._order), block))
        return kept

    def let_go(self, blocks: Sequence[Block], now: float) -> int:
        """End the promises for blocks given in path order; returns how many had one."""
        kept = [block for block in blocks if self._until.pop(block, None) is not None]
        pages = [page for block in kept for page in block.pages if page.kept]
        for page in pages:
            page.kept = False
        self._host.unpin(pages, now, used=False)
        return len(kept)

    def expire(self, now: float) -> None:
        """End the promises whose time is over."""
        over: list[Block] = []
        while self._queue and self._queue[0][0] <= now:
            until, _, block = heappop(self._queue)
            if self._until.get(block) == until:
                over.append(block)
        if over:
            over.sort(key=lambda block: block.depth)
            self.let_go(over, now)

    def __len__(self) -> int:
        return len(self._until)
