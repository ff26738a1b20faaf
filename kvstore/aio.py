"""The store for programs that run on asyncio: the same verbs, awaited.

Only what may wait is wrapped; everything else of a KVStore returns within microseconds and is called directly.
Waiting happens in the event loop's default executor, so the loop itself never blocks.
"""

from __future__ import annotations

import asyncio

from kvstore.base import KVStore
from kvstore.plan.records import FlushResult, LeaseStatus, LoadLease, Match, Request


class AsyncStore:
    """Awaitable waits over a KVStore. From the loop's thread."""

    def __init__(self, store: KVStore) -> None:
        self.store = store

    async def lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        """The longest prefix worth loading, waiting for shared tiers at most `timeout_s`."""
        match = self.store.lookup(request)
        if not match.pending:
            return match
        return await asyncio.to_thread(self.store.wait_lookup, request, timeout_s)

    async def load(
        self, request: Request, num_blocks: int, timeout_s: float | None = None
    ) -> tuple[LoadLease, LeaseStatus]:
        """Prepare a load and wait for its pages. The caller completes or releases the lease.

        Cancelling the task while it waits releases the lease.
        """
        lease = self.store.prepare_load(request, num_blocks)
        try:
            status = await asyncio.to_thread(self.store.wait, lease, timeout_s)
        except BaseException:
            self.store.release(lease)
            raise
        return lease, status

    async def flush(self, timeout_s: float) -> FlushResult:
        """Wait until everything saved and deleted so far is so on its tiers; true if it is, else what is missing."""
        return await asyncio.to_thread(self.store.flush, timeout_s)

    async def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left and close the store."""
        await asyncio.to_thread(self.store.close, timeout_s)
