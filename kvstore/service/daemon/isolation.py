"""`service.isolate`: clients on this machine can only read the slab; what they save passes through the daemon.

    client                                  daemon
    loads:  reads slots of the slab   <---  slab: the seal F_SEAL_FUTURE_WRITE leaves this process's mapping as the
                                            only one through which anything can be written
    saves:  writes slots of staging   --->  copied into slots of the slab when the lease is completed

Staging is memory of one client alone, and bounded. A lease's pages get slots of it, numbered from STAGING on, so that
number says where a page lies; pages that find none are skipped, as where the slab is full. What a client writes there
after it has completed a lease reaches nothing but its own page, and that only while it is copied.

Pages get no checksum on the way: memory does not lose bytes, and a client that saves wrong ones can do so anyway, under
keys of prompts of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.plan.records import SaveLease, SlotPages
from kvstore.plan.slots import SlotPool
from kvstore.service.protocol.messages import STAGING
from kvstore.store import LocalStore
from kvstore.tiers.host import HostSlab


class StagedSaves:
    """One client's staging, and the way of its pages into the slab. The daemon's event loop only."""

    def __init__(self, store: LocalStore, num_bytes: int) -> None:
        """Raises ConfigError if the memory cannot be had."""
        slot_bytes = store.layout.slot_bytes
        num_slots = max(1, num_bytes // slot_bytes)
        try:
            self.slab = HostSlab(num_slots, slot_bytes, shared_name="kvstore-staging", prefault=False)
        except ConfigError as error:
            raise ConfigError(f"service.isolate_bytes is {num_bytes}, for each client: {error}") from None
        self._store = store
        self._pool = SlotPool(num_slots)

    @property
    def num_slots(self) -> int:
        """Slots of staging."""
        return self._pool.num_slots

    @property
    def num_free(self) -> int:
        """Those that no lease has."""
        return self._pool.num_free

    def place(self, lease: SaveLease) -> SaveLease:
        """The lease as the client gets it: its first pages in slots of staging, the rest skipped."""
        slots = self._pool.take(len(lease.pages))
        first = lease.pages[: len(slots)]
        pages = SlotPages(first.blocks, first.groups, [STAGING + slot for slot in slots])
        return replace(lease, pages=pages, skipped=lease.skipped + len(lease.pages) - len(pages))

    def give_back(self, told: SaveLease) -> None:
        """A lease ended; told: as the client got it."""
        self._pool.give((told.pages.slots - STAGING).tolist())

    def copy(self, lease: SaveLease, told: SaveLease, filled: Sequence[bool], then: Callable[[bool], None]) -> None:
        """Copy the filled pages into the slab, in a thread; `then` is called in the loop, with whether that went well.

        The slots of both sides stay taken until then.
        """
        pairs = [
            (self._store.slots.array(slot), self.slab.array(own - STAGING))
            for slot, own, flag in zip(lease.pages.slots.tolist(), told.pages.slots.tolist(), filled, strict=False)
            if flag
        ]
        loop = asyncio.get_running_loop()
        copying = _StagedCopy(pairs)
        try:
            work = loop.run_in_executor(None, copying.run)
        except RuntimeError:  # no thread can be started; but one that is there has been given it, and comes to it later
            copying.run()
            loop.call_soon(then, True)
            return
        work.add_done_callback(lambda done: then(not done.cancelled() and done.exception() is None))

    def close(self) -> None:
        """The client is gone. A copy that is under way keeps the memory until it ends."""
        self.slab.close()


class _StagedCopy:
    """Pages on their way, each copied once: whoever comes later must not write to slots that may be others' by then."""

    def __init__(self, pairs: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
        self._pairs = pairs
        self._lock = threading.Lock()

    def run(self) -> None:
        """Copy what is not copied yet; return when all of it is. Any thread."""
        with self._lock:
            _copy_all(self._pairs)
            self._pairs = ()


def _copy_all(pairs: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]) -> None:
    for to, source in pairs:
        np.copyto(to, source)
