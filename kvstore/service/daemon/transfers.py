"""Pages on their way over plain HTTP: who moves them, what they hold, and when that ends.

A reader that takes nothing and a sender that sends a byte now and then hold slots of everybody's. So a transfer is
listed beside the clients, an operator can end it, and no lease of one lives longer than `service.lease_max_s`.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from aiohttp import web

from kvstore.plan.records import LoadLease, SaveLease
from kvstore.service.daemon import shares
from kvstore.service.daemon.stores import OpenStore

log = logging.getLogger(__name__)

MAX_TRANSFERS = 64

Lease = LoadLease | SaveLease


class TooManyTransfers(Exception):
    """No further transfer of pages now; the text says how many there are."""


class PageTransfer:
    """One request that moves pages. Its leases end with it, or are taken from it by `end`.

    number: names it to operators; name: says what it does and for whom.
    """

    def __init__(self, number: int, opened: OpenStore, name: str, end: Callable[[], object]) -> None:
        self.number = number
        self.opened = opened
        self.name = name
        self.began_at = self.moved_at = time.monotonic()
        self.leases: dict[int, tuple[Lease, float]] = {}  # by its id, and when it was granted
        self.is_over = False
        self._end = end

    def hold(self, lease: Lease) -> None:
        """It has a lease. Raises ConnectionAbortedError if it was ended meanwhile; the lease is released then."""
        if self.is_over:
            self.opened.store.release(lease)
        self.check()
        self.leases[lease.id] = (lease, time.monotonic())

    def complete(self, lease: Lease, filled: Sequence[bool] | None = None) -> None:
        """A lease ended well. filled: of a save, which of its pages are whole; None means all."""
        self.check()
        if self.leases.pop(lease.id, None) is not None:
            self.opened.store.complete(lease, filled=filled)

    def check(self) -> None:
        """Before every access to a slot. Raises ConnectionAbortedError if it was ended: the slots are another's."""
        if self.is_over:
            raise ConnectionAbortedError("the transfer was ended")
        self.moved_at = time.monotonic()

    def end(self) -> None:
        """Take its leases away and hang up. Idempotent."""
        if not self.is_over:
            self.is_over = True
            for lease, _ in self.leases.values():
                self.opened.store.release(lease)
            self.leases.clear()
            self._end()

    @property
    def oldest_at(self) -> float | None:
        """When the oldest of its leases was granted."""
        return min((granted_at for _, granted_at in self.leases.values()), default=None)


class Transfers:
    """All that are under way.

    number: gives each a number that no client has.
    """

    def __init__(self, lease_max_s: float, number: Callable[[], int]) -> None:
        self.num_expired = 0
        self.num_tenants = 1
        self._lease_max_s = lease_max_s
        self._number = number
        self._transfers: dict[int, PageTransfer] = {}

    def __iter__(self) -> Iterator[PageTransfer]:
        return iter(list(self._transfers.values()))

    @property
    def num_leases(self) -> int:
        """Leases that transfers hold."""
        return sum(len(one.leases) for one in self._transfers.values())

    @contextlib.contextmanager
    def begin(self, request: web.Request, opened: OpenStore, verb: str) -> Iterator[PageTransfer]:
        """One more, for the length of a block. Raises TooManyTransfers."""
        taken = Counter(one.opened.tenant.name for one in self._transfers.values())
        if not shares.has_room(opened.tenant.name, taken, MAX_TRANSFERS, self.num_tenants):
            told = f"{taken[opened.tenant.name]} of this tenant are under way, {sum(taken.values())} in all"
            raise TooManyTransfers(told)
        transport, task = request.transport, asyncio.current_task()

        def hang_up() -> None:
            if transport is not None:
                transport.abort()  # not close: that would wait for a reader that takes nothing
            if task is not None:
                task.cancel()

        transfer = PageTransfer(self._number(), opened, f"pages {verb} {request.remote or 'this machine'}", hang_up)
        self._transfers[transfer.number] = transfer
        timer = self._watch(transfer, self._lease_max_s)
        try:
            yield transfer
        finally:
            del self._transfers[transfer.number]
            timer[0].cancel()
            transfer.is_over = True
            for lease, _ in transfer.leases.values():
                opened.store.release(lease)

    def find(self, number: str) -> PageTransfer | None:
        """The transfer of that number."""
        return next((one for one in self._transfers.values() if str(one.number) == number), None)

    def _watch(self, transfer: PageTransfer, delay_s: float) -> list[asyncio.TimerHandle]:
        loop = asyncio.get_running_loop()
        timer: list[asyncio.TimerHandle] = []

        def look() -> None:
            oldest = transfer.oldest_at
            left_s = self._lease_max_s if oldest is None else oldest + self._lease_max_s - time.monotonic()
            if left_s > 0:
                timer[0] = loop.call_later(left_s, look)
                return
            self.num_expired += len(transfer.leases)
            log.warning("%s: released %d leases it held too long", transfer.name, len(transfer.leases))
            transfer.end()

        timer.append(loop.call_later(delay_s, look))
        return timer
