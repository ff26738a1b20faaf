"""Blocks in the order in which something said about them ends.

A heap whose entries may be out of date: what was said may have been said again, for longer, or taken back. The owner
knows what counts (`until_of`), so an entry that says otherwise is passed over when its time has come, and all are made
anew when too many such entries have gathered. O(log entries) each. Under the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from kvstore.plan.state import Block
from radix.untracked import untrack

MAX_STALE = 1024  # entries that do not count any more, beside as many as do


class Ends:
    """until_of: when what is said about a block ends; minus infinity where nothing is."""

    def __init__(self, until_of: Callable[[Block], float]) -> None:
        self._until_of = until_of
        self._queue: list[tuple[float, int, Block]] = []
        self._order = count()

    def note(self, block: Block, until: float) -> None:
        """Something about a block ends then."""
        entry = (until, next(self._order), block)
        untrack([entry])  # nothing names it but the queue
        heappush(self._queue, entry)

    def over(self, now: float, limit: int) -> list[Block]:
        """Return up to `limit` blocks of which all is over `now`; they are not named again."""
        found: list[Block] = []
        while self._queue and self._queue[0][0] <= now and len(found) < limit:
            until, _, block = heappop(self._queue)
            if self._until_of(block) == until != -inf:
                found.append(block)
        return found

    def is_bloated(self, num_blocks: int) -> bool:
        """True if most entries do not count: the owner rebuilds. num_blocks: about which something is said."""
        return len(self._queue) > 2 * num_blocks + MAX_STALE

    def rebuild(self, blocks: Iterable[Block]) -> None:
        """Name exactly these blocks, with the ends that they have now."""
        self._queue = [(self._until_of(block), next(self._order), block) for block in blocks]
        untrack(self._queue)
        heapify(self._queue)

    def __len__(self) -> int:
        return len(self._queue)
