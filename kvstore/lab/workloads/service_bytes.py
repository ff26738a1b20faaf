"""Saves and loads through a daemon, over memcpy between memory of the same kinds, a page at a time.

Slots are of the same kind everywhere and were touched before. Those of the ceiling are as many as the store's and used
in turn like them, so that neither lives in a cache. The last case is a daemon with `service.isolate`, which copies what
is saved once more. Seconds of CPU of this process and of the daemon say more than the time on a machine with
neighbours; where both work at once, the larger one bounds the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, cycle, islice

import numpy as np
import numpy.typing as npt

from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.daemon_process import BLOCK_SIZE, CALL_TIMEOUT_S, daemon_process, open_remote
from kvstore.plan.records import Request
from kvstore.service.client.store import RemoteStore
from kvstore.tiers.host import HostSlab
from kvstore.units import KiB, MiB

PAGE_BYTES = 2 * MiB
BATCH_BYTES = 64 * MiB  # of a save or load
NUM_BATCHES = 4  # that the store keeps, used in turn
PIECES = 64  # of a page in the engine's memory: keys and values of 32 layers

Slots = Sequence[npt.NDArray[np.uint8]]
Copy = Callable[[Slots], object]


def run(argument: str, quick: bool) -> list[Table]:
    """Measure pages of 2 MiB through shared memory."""
    engine = _EngineMemory()
    # Those stored, those the client keeps, and one that is being saved.
    capacity = (2 * NUM_BATCHES + 1) * BATCH_BYTES
    with ExitStack() as stack:
        url, daemon = stack.enter_context(daemon_process(capacity))
        client = _Client(stack.enter_context(open_remote(url, PAGE_BYTES)), engine.num_pages)
        isolate = ("service.isolate=true", f"service.isolate_bytes={2 * BATCH_BYTES}")
        apart_url, apart_daemon = stack.enter_context(daemon_process(capacity, *isolate))
        apart = _Client(stack.enter_context(open_remote(apart_url, PAGE_BYTES)), engine.num_pages)
        theirs = client.slots()
        slab = stack.enter_context(closing(HostSlab(NUM_BATCHES * engine.num_pages, PAGE_BYTES, shared_name="bench")))
        own = cycle(map(slab.array, range(slab.num_slots)))

        def table(verb: str, move: str, copy: Copy, in_one_call: Copy) -> Table:
            def case(name: str, work: Callable[[], object], of: _Client = client, process: int = daemon) -> Case:
                return Case(name, work, BATCH_BYTES, of.new_prompt, process)

            ours, isolated = getattr(client, move), getattr(apart, move)
            cases = [
                Case("memcpy", lambda: copy(list(islice(own, engine.num_pages))), BATCH_BYTES),
                case("copy alone", lambda: copy(list(islice(theirs, engine.num_pages)))),
                case("lease alone", partial(ours, _copy_nothing)),
                case("lease and copy", partial(ours, copy)),
                case("lease and copy in one call", partial(ours, in_one_call)),
                case("the same, service.isolate", partial(isolated, in_one_call), apart, apart_daemon),
            ]
            return measure(f"{verb} {engine.num_pages} pages of {PAGE_BYTES // KiB} KiB", "bytes", cases, quick=quick)

        return [
            table("save", "save", engine.copy_out, engine.gather),
            table("load", "load", engine.copy_in, engine.scatter),
        ]


class _EngineMemory:
    """Memory of an engine for one batch of pages, and its two ways of copying."""

    def __init__(self) -> None:
        self.num_pages = BATCH_BYTES // PAGE_BYTES
        self._pages = np.random.default_rng(0).integers(0, 256, (self.num_pages, PAGE_BYTES), np.uint8)
        self._table = paged_table(list(self._pages.reshape(PIECES, self.num_pages, -1)))
        self._device = CpuDevice()

    def copy_out(self, slots: Slots) -> None:
        """Save into slots, a page at a time."""
        for slot, page in zip(slots, self._pages, strict=True):
            np.copyto(slot, page)

    def copy_in(self, slots: Slots) -> None:
        """Load from slots, a page at a time."""
        for slot, page in zip(slots, self._pages, strict=True):
            np.copyto(page, slot)

    def gather(self, slots: Slots) -> None:
        """Save as the connectors do: one call, from all of the engine's tensors."""
        self._device.copy_out(self._table, range(self.num_pages), slots).wait()

    def scatter(self, slots: Slots) -> None:
        """Load as the connectors do."""
        self._device.copy_in(self._table, range(self.num_pages), slots).wait()


class _Client:
    """A store that is filled, and whole saves and loads of a batch."""

    def __init__(self, store: RemoteStore, num_pages: int) -> None:
        self._store = store
        self._num_pages = num_pages
        self._tokens = count(0, num_pages * BLOCK_SIZE)
        self._stored: list[Request] = []  # least recently used first
        for _ in range(NUM_BATCHES):
            self.new_prompt()
            self.save(_copy_nothing)

    def new_prompt(self) -> None:
        """Make the prompt that is saved next; hashing it is the engine's affair, however its pages are kept."""
        start = next(self._tokens)
        # One token more than the pages hold: an engine has to compute at least one.
        self._fresh = self._store.request(np.arange(start, start + self._num_pages * BLOCK_SIZE + 1, dtype=np.uint32))

    def save(self, copy: Copy) -> None:
        """Lease, copy, complete."""
        lease = self._store.prepare_save(self._fresh, 0, self._num_pages)
        if len(lease.pages) != self._num_pages:
            raise RuntimeError(f"bench service-bytes: {len(lease.pages)} of {self._num_pages} pages found a slot")
        copy([self._store.slots.array(page.slot) for page in lease.pages])
        self._store.complete(lease)
        self._stored = [*self._stored, self._fresh][-NUM_BATCHES:]

    def load(self, copy: Copy) -> None:
        """Lookup, lease, copy, complete."""
        self._stored = [*self._stored[1:], self._stored[0]]
        match = self._store.lookup(self._stored[-1])
        lease = self._store.prepare_load(self._stored[-1], match.num_blocks)
        if self._store.wait(lease, CALL_TIMEOUT_S).num_blocks != self._num_pages:
            raise RuntimeError(f"bench service-bytes: {len(lease.pages)} of {self._num_pages} pages were found again")
        copy([self._store.slots.array(page.slot) for page in lease.pages])
        self._store.complete(lease)

    def slots(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Slots of the daemon that are this client's for good, in turn."""
        num_blocks = NUM_BATCHES * self._num_pages
        request = self._store.request(np.full(num_blocks * BLOCK_SIZE + 1, 1 << 31, np.uint32))
        lease = self._store.prepare_save(request, 0, num_blocks)
        return cycle([self._store.slots.array(page.slot) for page in lease.pages])


def _copy_nothing(slots: Slots) -> None:
    """Leave the slots as they are."""
