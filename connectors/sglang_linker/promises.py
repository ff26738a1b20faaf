"""Lookups of SGLang's scheduler, answered by promises that are always kept.

    lookup --> lease: what is in host memory is pinned, what lies below is on its way up
           --> the answer: pages whose bytes are in host memory now, and no others
    load   --> takes the promise along; else the lease lapses

SGLang aborts the requests of a load that fails. So an answer names leased bytes alone, and the rest of a hit is in host
memory by the next lookup: SGLang looks a waiting request up in each of its scheduling passes. It does not tell a linker
that a request went away between lookup and load, nor that it was admitted with less; such leases end after `LEASE_S`,
or when a lookup needs their room, the oldest first.

The scheduler's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.base import KVStore, LeaseState, LoadLease, Request, RequestOptions

MAX_LEASED_FRACTION = 0.5  # of the host slots, for requests that were looked up and not loaded yet
LEASE_S = 10.0  # without a lookup; scheduling passes are milliseconds apart
LOOK_AGAIN_S = 0.25  # for what was not stored: it can come in the meantime, and a pass must cost next to nothing
COUNTERS = ("lookups", "hit_pages", "asked_pages", "lapsed_leases", "crowded_leases")


@dataclass(slots=True)
class Promise:
    """What a request was told last.

    first:     pages before it are in SGLang's own pools.
    lease:     of pages [first, lease.num_blocks); None if nothing is stored.
    num_ready: pages from the root that can be read, once all of the lease that will come has come; else None.
    looked_at: when the store was asked; asked_at: when SGLang asked last.
    """

    rid: str
    request: Request
    first: int
    last_hash: bytes
    lease: LoadLease | None = None
    num_ready: int | None = None
    looked_at: float = 0.0
    asked_at: float = 0.0
    is_pending: bool = False

    def is_of(self, path: Sequence[bytes], first: int) -> bool:
        """Whether it is of these pages. The last hash names all before it."""
        return self.first == first and len(self.request.keys) == len(path) and self.last_hash == path[-1]


class Promises:
    """The leases of requests between their lookup and their load.

    counters: those of COUNTERS.
    """

    def __init__(self, store: KVStore, counters: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._counters = counters
        self._now = now
        self._held: dict[str, Promise] = {}  # by request, the one that was asked for longest ago first

    def lookup(self, rid: str, path: Sequence[bytes], first: int) -> int:
        """How many pages of `path` after the first `first` are promised to the request."""
        self.tick()
        self._counters["lookups"] += 1
        self._counters["asked_pages"] += len(path) - first
        promise = self._held.pop(rid, None)
        if promise is not None and not promise.is_of(path, first):
            self.give_back(promise)
            promise = None
        if promise is None:
            num_tokens = len(path) * self._store.layout.block_size
            request = self._store.request_from_hashes(path, num_tokens, RequestOptions(whole=True))
            promise = Promise(rid, request, first, path[-1])
        promise.asked_at = self._now()
        self._held[rid] = promise
        num_ready = self._ready(promise)
        if num_ready < len(path) and self._looks_again(promise):
            self._lease(promise)
            num_ready = self._ready(promise)
        self._counters["hit_pages"] += num_ready - first
        return num_ready - first

    def take(self, rid: str, hashes: Sequence[bytes]) -> Promise | None:
        """The promise of a load of these pages, for `give_back` after it; None if it cannot be kept any more.

        Of several ranks, the one with the fewest pages decides: so they may be fewer than were promised here.
        """
        promise = self._held.pop(rid, None)
        if promise is None:
            return None
        end = promise.first + len(hashes)
        promise.num_ready = None  # asked anew: a daemon may have gone since
        if hashes and self._ready(promise) >= end:
            last = self._store.request_from_hashes(hashes[-1:], self._store.layout.block_size)
            if last.keys[0] == promise.request.keys[end - 1]:  # which names all before it
                return promise
        self.give_back(promise)
        return None

    def give_back(self, promise: Promise, *, was_used: bool = False) -> None:
        """End a lease. Any thread."""
        if promise.lease is not None:
            end = self._store.complete if was_used else self._store.release
            end(promise.lease)
        self._store.keep.finished(promise.request)

    def tick(self) -> None:
        """End leases that nobody asks for any more."""
        now = self._now()
        while self._held:
            oldest = next(iter(self._held.values()))
            if now - oldest.asked_at < LEASE_S:
                break
            self._counters["lapsed_leases"] += oldest.lease is not None
            self.give_back(self._held.pop(oldest.rid))

    def clear(self) -> None:
        """End all leases."""
        while self._held:
            self.give_back(self._held.pop(next(iter(self._held))))

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_pages(self) -> int:
        """Pages under lease."""
        return sum(len(held.lease.pages) for held in self._held.values() if held.lease is not None)

    def _ready(self, promise: Promise) -> int:
        """Pages from the root that can be read now; `first` if none after it can."""
        if promise.lease is None:
            return promise.first
        if promise.num_ready is None:
            status = self._store.poll(promise.lease)
            num_ready = max(promise.first, status.num_blocks)
            if status.state is not LeaseState.READY:
                return num_ready
            promise.num_ready = num_ready
        return promise.num_ready

    def _looks_again(self, promise: Promise) -> bool:
        """Whether the store may have more than the lease."""
        if not promise.looked_at or promise.is_pending:
            return True
        if promise.lease is not None and promise.num_ready is None:
            return self._store.poll(promise.lease).state is LeaseState.CLOSED  # else more is on its way
        return self._now() - promise.looked_at >= LOOK_AGAIN_S

    def _lease(self, promise: Promise) -> None:
        """Lease what the store has; what lies below host memory is fetched from now on."""
        store, request, first = self._store, promise.request, promise.first
        promise.looked_at = self._now()
        request.held = first
        match = store.lookup(request)
        if match.pending and not promise.is_pending:
            store.prefetch(request)  # a shared tier answers later, and SGLang may not ask again
        promise.is_pending = match.pending
        num_pages = min(match.num_blocks - first, self._room(promise.rid, match.num_blocks - first))
        before, promise.lease, promise.num_ready = promise.lease, None, None
        try:
            if num_pages > 0:
                lease = store.prepare_load(request, first + num_pages, first=first)
                if lease.num_blocks > first:
                    promise.lease = lease
                else:
                    store.release(lease)
        finally:
            if before is not None:
                store.release(before)  # only now: what both have stayed pinned

    def _room(self, rid: str, num_pages: int) -> int:
        """How many pages may be leased, of `num_pages`; older leases make room for them."""
        buffer = self._store.slots.buffer
        slots = 0 if buffer is None else buffer.nbytes // self._store.layout.slot_bytes
        most = max(1, int(MAX_LEASED_FRACTION * slots))
        for other in list(self._held.values()):
            if self.num_pages + num_pages <= most:
                break
            if other.rid != rid and other.lease is not None:
                self._counters["crowded_leases"] += 1
                self.give_back(self._held.pop(other.rid))
        return most
