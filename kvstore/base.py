"""The face of the store: what connectors call, in process or through a node daemon.

`LocalStore` (store.py) keeps the pages in this process. Whatever implements `KVStore` gives out slots of one host
slab by number; the caller copies between `slot_view(slot)` and the engine's pages, so the same protocol serves one
process, several ranks over shared memory and remote peers.

The walk of one request:

    request = store.request(tokens)
    match = store.wait_lookup(request, timeout_s)          # or poll lookup() until not pending
    lease = store.prepare_load(request, match.num_blocks)  # pins, allocates, starts fetching
    status = store.wait(lease, timeout_s)                  # or poll(lease)
    ...copy slots of lease.pages -> engine...              # blocks [0, status.num_blocks) only
    store.complete(lease)
    ...prefill the rest...
    lease = store.prepare_save(request, first, num_blocks)
    ...copy engine -> slots of lease.pages...
    store.complete(lease)                                  # publishes; written behind to the lower tiers
    store.finished(request)

No method raises for a failing tier: what cannot be loaded is a miss, what cannot be saved is skipped and counted.
Methods raise RequestError for misuse and StoreClosed after close. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from kvstore.plan.records import (
    FlushResult,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
)

Tokens = npt.ArrayLike | memoryview


class KVStore(Protocol):
    """A tiered store of KV pages of one namespace."""

    @property
    def layout(self) -> Layout: ...

    def request(self, tokens: Tokens, options: RequestOptions | None = None) -> Request:
        """Hash the full blocks of `tokens` (any 1-D integer array or buffer) into a new request."""

    def request_from_hashes(
        self, hashes: Sequence[bytes], num_tokens: int, options: RequestOptions | None = None
    ) -> Request:
        """A request whose blocks an engine has hashed already; each hash is bound to this store's namespace."""

    def extend(self, request: Request, tokens: Tokens) -> None:
        """Append tokens (those after the ones the request has) and hash the blocks they fill."""

    def extend_hashes(self, request: Request, hashes: Sequence[bytes], num_tokens: int) -> None:
        """Append hashes an engine made for further blocks; the prompt is `num_tokens` long then."""

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading. Never blocks and does no I/O; `pending` means ask again.

        With `RequestOptions.single_flight`, an answer that is not pending makes this request the one that computes what
        it misses, until that is saved or `finished` is called.
        """

    def wait_lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        """Lookup, waiting while it is pending, at most `timeout_s`.

        None: at most the configured lookup deadline for tiers; for another request's computing (single flight) until
        that is done, has ended, or has made no progress for longer than computing here would take.
        """

    def peek(self, request: Request, timeout_s: float | None = None) -> Match:
        """The match that a lookup would give, for callers that only ask: nothing is counted, claimed or remembered.

        Waits at most `timeout_s` for tiers (default: the configured lookup deadline). The request is over afterwards.
        """

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there. May grant fewer.

        first: the blocks before it are in the engine's own memory already.
        """

    def wait(self, lease: LoadLease, timeout_s: float | None = None) -> LeaseStatus:
        """Wait until the lease is ready, at most `timeout_s` (default: the configured load deadline)."""

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease, at once."""

    def prepare_save(self, request: Request, first: int, num_blocks: int, *, owner: str = "") -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have."""

    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        """End a lease: unpin after a load; publish after a save (`filled` says which pages are whole; default all)."""

    def release(self, lease: LoadLease | SaveLease) -> None:
        """End a lease without success: unpin, or drop what was being filled. Idempotent."""

    def release_owner(self, owner: str) -> int:
        """Release every lease of an owner that died; return how many."""

    def prefetch(self, request: Request) -> int:
        """Start bringing the known prefix into host memory; returns a ticket. Bounded; never evicts what is in use."""

    def cancel(self, ticket: int) -> None:
        """Stop a prefetch: queued transfers are dropped, those under way become resident."""

    def finished(self, request: Request, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """The request is over: refresh its path in every tier, or let it go first if no turn will follow."""

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until `unpin`; return how many blocks are pinned.

        Fewer than are resident where the budget for it ends (`store.max_pinned_fraction` of the host slots, of all pins
        together). A pin that nobody undoes ends after `store.pin_max_s`.
        """

    def unpin(self, request: Request) -> int:
        """Undo `pin`."""

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that is known to continue them; return how many.

        They are gone from host memory at once, and no lookup finds them any more. On lower tiers a delete is owed as a
        write is: it is acknowledged by the next true `flush`, and tried again where a tier cannot be reached.
        """

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes, so that lookups can weigh loading against recomputing."""

    def slot_view(self, slot: int) -> memoryview:
        """The bytes of a slot, `layout.slot_bytes` long, writable. Valid while a lease holds the slot."""

    def slot_array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same bytes as an array: use np.copyto, which releases the GIL (memoryview assignment holds it)."""

    def flush(self, timeout_s: float) -> FlushResult:
        """Wait until everything saved, and everything deleted, so far is so on every tier that should have it.

        The result is true if it is, and says what is missing if not: because the time ran out, because a tier is out or
        refuses it (then without waiting: a later flush tries again), or because it was lost. Only a true result is an
        acknowledgement. What a caller was told to be lost for good is not told again.
        """

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as plain numbers."""

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left (at most `timeout_s`), stop all threads, give everything back. Idempotent."""
