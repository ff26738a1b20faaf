"""The face of the store: what connectors call, in process or through a node daemon, and the values that they exchange.

`LocalStore` (store.py) keeps the pages in this process. Whatever implements `KVStore` gives out slots of one host
slab by number; the caller copies between `slots.array(slot)` and the engine's pages, so the same protocol serves one
process, several ranks over shared memory and the clients of a daemon.

The walk of one request:

    request = store.request(tokens)
    match = store.wait_lookup(request, timeout_s)          # or ask lookup() again until it is not pending
    lease = store.prepare_load(request, match.num_blocks)  # pins, allocates, starts fetching
    status = store.wait(lease, timeout_s)                  # or poll(lease)
    ...copy slots of lease.pages -> engine...              # blocks [0, status.num_blocks) only
    store.complete(lease)
    ...prefill the rest...
    lease = store.prepare_save(request, first, num_blocks)
    ...copy engine -> slots of lease.pages...
    store.complete(lease)                                  # publishes; written behind to the lower tiers
    store.keep.finished(request)

The face has parts. `KVStore` itself is the core, no verb of which waits; `RequestFactory` makes requests; and what
waits is in `Waits` (waits.py), written once for all stores. `store.slots` concerns bytes, `store.keep` how long pages
stay.

No method raises for a failing tier: what cannot be loaded is a miss, what cannot be saved is skipped and counted.
Methods raise RequestError for misuse and StoreClosed after close. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.layout import Layout
from kvstore.plan.journal import BlockEvent, Event
from kvstore.plan.records import (
    HOST,
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
    SlotPages,
)
from kvstore.waits import Waits

__all__ = [
    "HOST",
    "BlockEvent",
    "CutReason",
    "Event",
    "FlushResult",
    "HintOutcome",
    "HintStatus",
    "KVStore",
    "Keep",
    "LeaseState",
    "LeaseStatus",
    "LoadLease",
    "Match",
    "Request",
    "RequestFactory",
    "RequestOptions",
    "SaveLease",
    "Slab",
    "SlotPage",
    "SlotPages",
    "Slots",
    "Tokens",
    "Waits",
]

Tokens = npt.ArrayLike | memoryview


class RequestFactory(Protocol):
    """The making of requests: prompts of one namespace, hashed block by block."""

    @property
    def layout(self) -> Layout:
        """The geometry of the namespace's pages."""

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


class Slab(Protocol):
    """The name of memory that slots lie in, for other processes of the engine (`opening.attach_slab`). Plain data."""

    @property
    def num_slots(self) -> int:
        """Slots in it."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of each."""

    def holds(self, slot: int) -> bool:
        """Whether a slot, by its number in a lease, lies in this slab."""


class Slots(Protocol):
    """The bytes of slots."""

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot, `layout.slot_bytes` long, writable. Valid while a lease holds the slot."""

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same bytes as an array: use np.copyto, which releases the GIL (memoryview assignment holds it)."""

    @property
    def slabs(self) -> Sequence[Slab]:
        """The slabs that slots of open leases lie in, the newest last; none while there is no daemon.

        Ask for each step of an engine: there is another one after a daemon has started again.
        """

    @property
    def buffer(self) -> npt.NDArray[np.uint8] | None:
        """The whole of the newest slab, for a device to page-lock; None while there is no daemon."""


class Keep(Protocol):
    """How long the pages of requests stay."""

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until `unpin`; return how many blocks are pinned.

        Fewer than are resident where the budget for it ends (`store.max_pinned_fraction` of the host slots, of all pins
        together). A pin that nobody undoes ends after `store.pin_max_s`.
        """

    def unpin(self, request: Request) -> int:
        """Undo `pin`; return how many blocks had one."""

    def set_ttl(self, request: Request, ttl_s: float) -> int:
        """Give the request's known blocks a time to live from now on; return how many."""

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that is known to continue them; return how many.

        They are gone from host memory at once, and no lookup finds them any more. On lower tiers a delete is owed as a
        write is: it is acknowledged by the next true `flush`, and tried again where a tier cannot be reached.
        """

    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        """The request is over: refresh its path in every tier, or let it go first if no turn will follow.

        reply_tokens: tokens of the answer, -1 if unknown; policies that learn go by it.
        """


class KVStore(RequestFactory, Waits, Protocol):
    """A tiered store of KV pages of one namespace."""

    @property
    def slots(self) -> Slots:
        """The bytes of the slots that leases name."""

    @property
    def keep(self) -> Keep:
        """How long pages stay."""

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading. Never blocks and does no I/O; `pending` means ask again.

        With `RequestOptions.single_flight`, an answer that is not pending makes this request the one that computes what
        it misses, until that is saved or `keep.finished` is called.
        """

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there. May grant fewer.

        first: the blocks before it are in the engine's own memory already.
        """

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease, at once."""

    def prepare_save(
        self, request: Request, first: int, num_blocks: int, *, owner: str = "", states: Sequence[int] = ()
    ) -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have.

        states: of a model that keeps a state: the blocks among them after whose last token the caller has it. The lease
                has slots for all pieces of a state (groups from `layout.block_groups` on) or for none.
        """

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

    def hint(
        self, envelope: object, request: Request | None = None, *, options: RequestOptions | None = None
    ) -> tuple[HintOutcome, ...]:
        """Do what a caller says of the future of prompts, as far as the bounds allow; one outcome for each action.

        envelope: JSON as bytes or text, a dict, or an engine's own struct (vLLM's `KvHintsEnvelope`), see
                  docs/hints.md. Anything else, or too much of it, is an outcome too: this raises StoreClosed only.
        request:  the one that the hint came with: actions that name no tokens or hashes are about its prompt. What
                  is not stored of it yet is treated so as it is saved, and once more when the request is finished; a
                  duration then begins. Call it after `request` is made, before `keep.finished`; a door of an engine
                  needs no other call, and keeps no note of the hint.
        options:  of the prompts that actions name by tokens or hashes, where there is no request: their tenant. No
                  tenant can name blocks of another.

        Never changes an answer of a lookup but by what is stored. Waits for no tier; of a daemon's store, at most as
        long as any other call.
        """

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes, so that lookups can weigh loading against recomputing."""

    def want_events(self) -> None:
        """Write down from now on what comes and goes, for `take_events`. Idempotent."""

    def take_events(self) -> list[BlockEvent]:
        """The blocks that came and went since the last call; `DROPPED` where not all is known that left."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges as plain numbers."""

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left (at most `timeout_s`), stop all threads, give everything back. Idempotent."""
