"""RemoteStore: the store's face (kvstore/base.py) over a link to a node daemon.

Prompts are hashed here, planning happens in the daemon, and bytes are copied by the caller between its own pages and
the slab, which is mapped into this process. While the daemon is away everything is a miss: lookups match nothing,
leases have no page, and no call waits longer than its deadline. It is attached again by the first call after it is
back.

A lease belongs to the attachment it was granted under. Its slots stay mapped until it ends, even if the daemon is gone
by then: what was ready may still be copied, and what is being saved is written to where nobody looks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.base import Tokens
from kvstore.errors import ConfigError, LayoutMismatch, RequestError, StoreClosed
from kvstore.layout import Layout
from kvstore.plan.records import (
    CutReason,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
)
from kvstore.requests import RequestMaker, check_blocks, check_range
from kvstore.service import messages, protocol
from kvstore.service.link import EPOCH_BITS, Attachment, DaemonDown, Link
from kvstore.service.namespaces import check_pair, layout_to_json, namespace_to_json
from kvstore.service.protocol import Op, Status
from kvstore.service.slab import SlabShare
from kvstore.service.staging import Staging
from kvstore.service.wire import Dial
from kvstore.tiers.host import HostSlab, SlabHandle
from radix.namespace import Namespace

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 30.0  # of the first hello: the daemon may have to read a directory of millions of pages
MISS = Match(0, 0, cut=CutReason.NEVER_STORED)
CLOSED = LeaseStatus(LeaseState.CLOSED, 0, 0)
LOOKUP_DEADLINE_S = 0.05  # while no daemon has told its own
LOAD_DEADLINE_S = 2.0
COMPUTING_CALL_S = 5.0  # how long one call waits for another request's computing


@dataclass(slots=True)
class _Held:
    """A lease that is open. status: of a load, as last heard."""

    attachment: Attachment
    owner: str
    status: LeaseStatus | None
    pages: tuple[SlotPage, ...] = ()
    has_come: bool = True  # False while the pages of a load are still to be brought from another machine


class RemoteStore:
    """A KVStore (see base.py) kept by a daemon on this machine. Any thread.

    Made by `kvstore.connect`. A daemon that cannot be reached is no error: the store is empty until it can.
    Raises ConfigError or LayoutMismatch if the daemon refuses this layout or namespace.
    """

    def __init__(
        self,
        dial: Dial,
        layout: Layout,
        namespace: Namespace,
        *,
        call_timeout_s: float = 1.0,
        retry_max_s: float = 2.0,
        client: str = "",
        staging: Staging | None = None,
        socket: str = "",
    ) -> None:
        """Attach.

        staging: slots here for the pages of a daemon that cannot share its own; None for one on this machine.
        socket:  path of the socket of one on this machine, for other processes to attach to.
        """
        check_pair(layout, namespace)
        self._layout = layout
        self.namespace = namespace
        self._requests = RequestMaker(namespace)
        self._lease_ids = count(1)
        self._held: dict[int, _Held] = {}
        self._staging = staging
        self._socket = socket
        self._shares: dict[int, SlabShare] = {}  # as `_slabs`
        self._slabs: dict[int, HostSlab] = {}  # by epoch: of the attachment, and of lost ones with leases
        self._lock = threading.Lock()  # of the two tables above; never held while calling
        self._is_closed = False
        greeting = {"layout": layout_to_json(layout), "namespace": namespace_to_json(namespace), "client": client}
        self._link = Link(dial, protocol.encode_json(greeting), call_timeout_s=call_timeout_s, retry_max_s=retry_max_s)
        try:
            self._attach(HELLO_TIMEOUT_S)
        except DaemonDown as error:
            log.warning("no daemon yet, the store starts empty: %s", error)
        except BaseException:
            self.close()
            raise

    # ---- requests ---------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The geometry of this store's pages."""
        return self._layout

    @property
    def is_attached(self) -> bool:
        """True if a daemon was there at the last call."""
        attachment = self._link.attachment
        return attachment is not None and not attachment.is_lost

    @property
    def num_attached(self) -> int:
        """How often a daemon was attached to; more than one after a restart."""
        return self._link.num_attached

    def request(self, tokens: Tokens, options: RequestOptions | None = None) -> Request:
        """Hash the full blocks of `tokens` into a new request. Raises RequestError for what is no prompt."""
        return self._requests.request(tokens, options)

    def request_from_hashes(
        self, hashes: Sequence[bytes], num_tokens: int, options: RequestOptions | None = None
    ) -> Request:
        """A request whose blocks an engine has hashed already."""
        return self._requests.request_from_hashes(hashes, num_tokens, options)

    def extend(self, request: Request, tokens: Tokens) -> None:
        """Append tokens and hash the blocks they fill."""
        self._requests.extend(request, tokens)

    def extend_hashes(self, request: Request, hashes: Sequence[bytes], num_tokens: int) -> None:
        """Append hashes an engine made for further blocks."""
        self._requests.extend_hashes(request, hashes, num_tokens)

    # ---- lookups and loads ------------------------------------------------------------------------------------

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading."""
        return self.wait_lookup(request, 0.0)

    def wait_lookup(self, request: Request, timeout_s: float | None = None) -> Match:
        """Lookup, waiting for pending tiers, and as long as the daemon says for another request's computing."""
        self._check_open()
        if timeout_s is not None:
            return self._lookup(request, timeout_s)
        match = self._lookup(request, self._lookup_deadline_s)
        while match.cut is CutReason.COMPUTING:  # the daemon ends that in good time
            match = self._lookup(request, COMPUTING_CALL_S)
        return match

    def peek(self, request: Request, timeout_s: float | None = None) -> Match:
        """What a lookup would find, without its consequences."""
        self._check_open()
        try:
            return self._lookup(request, self._lookup_deadline_s if timeout_s is None else timeout_s, Op.PEEK)
        finally:
            attachment = self._link.attachment
            if attachment is not None:
                attachment.sent.pop(request.id, None)

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there."""
        check_range("num_blocks", num_blocks, len(request.keys))
        check_range("first", first, num_blocks)
        self._check_open()
        lease_id = next(self._lease_ids)
        try:
            attachment, answer = self._prepare(Op.PREPARE_LOAD, request, lease_id, first, num_blocks, owner)
            lease, status = messages.decode_load(answer, lease_id, attachment.slot_base)
        except (DaemonDown, protocol.ProtocolError):
            return LoadLease(lease_id, 0, 0, ())
        held = _Held(attachment, owner, status, lease.pages)
        if self._staging is not None:
            placed = self._staging.place(lease.pages)
            if placed is None:
                return self._less(request, lease_id, attachment, first, num_blocks, owner)
            lease = replace(lease, pages=placed)
            held.pages, held.has_come = placed, not placed
        self._hold(lease_id, held)
        return lease

    def wait(self, lease: LoadLease, timeout_s: float | None = None) -> LeaseStatus:
        """Wait until the lease is ready, at most until the load deadline."""
        self._check_open()
        held = self._held.get(lease.id)
        if held is None or held.status is None:
            return CLOSED
        if held.status.state is LeaseState.READY and held.has_come:
            return held.status  # final: no need to ask
        if held.attachment is not self._link.attachment:
            return CLOSED
        timeout_s = _bounded(held.attachment.load_deadline_s if timeout_s is None else timeout_s)
        until = time.monotonic() + timeout_s
        try:
            if held.status.state is not LeaseState.READY:
                message = messages.encode_wait(lease.id, timeout_s)
                _, answer = self._link.call(held.attachment, Op.WAIT, message, timeout_s)
                held.status = messages.decode_status(answer)
            if self._staging is not None and held.status.state is LeaseState.READY:
                self._bring(lease.id, held, self._staging, until)
        except (DaemonDown, protocol.ProtocolError):
            return CLOSED
        return held.status if held.has_come else LeaseStatus(LeaseState.WAITING, 0, 0)

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease."""
        return self.wait(lease, 0.0) if not self._is_closed else CLOSED

    def prefetch(self, request: Request) -> int:
        """Start bringing the known prefix into host memory; returns a ticket, 0 if there is no daemon."""
        self._check_open()
        return self._number(Op.PREFETCH, request, bytes)

    def cancel(self, ticket: int) -> None:
        """Stop a prefetch."""
        if ticket:
            self._tell(Op.CANCEL, messages.encode_number(ticket))

    # ---- saves ------------------------------------------------------------------------------------------------

    def prepare_save(self, request: Request, first: int, num_blocks: int, *, owner: str = "") -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have."""
        check_blocks(request, first, num_blocks)
        self._check_open()
        lease_id = next(self._lease_ids)
        try:
            attachment, answer = self._prepare(Op.PREPARE_SAVE, request, lease_id, first, first + num_blocks, owner)
            lease = messages.decode_save(answer, lease_id, attachment.slot_base)
        except (DaemonDown, protocol.ProtocolError):
            return SaveLease(lease_id, (), num_blocks * len(self._layout.groups))
        if self._staging is not None:
            placed = self._staging.place(lease.pages)
            if placed is None:
                self._abandon(attachment, lease_id)
                return SaveLease(lease_id, (), lease.skipped + len(lease.pages))
            lease = replace(lease, pages=placed)
        self._hold(lease_id, _Held(attachment, owner, None, lease.pages))
        return lease

    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        """End a lease well. A lease that ended already is ignored."""
        if filled is not None and len(filled) != len(lease.pages):
            raise RequestError(f"filled has {len(filled)} entries; the lease has {len(lease.pages)} pages")
        held = self._held.get(lease.id)
        if self._staging is not None and held is not None and held.status is None and held.pages:
            self._send(lease.id, held, self._staging, filled)
        else:
            self._end(lease.id, Op.COMPLETE, messages.encode_complete(lease.id, filled))

    def release(self, lease: LoadLease | SaveLease) -> None:
        """End a lease badly. A lease that ended already is ignored."""
        self._end(lease.id, Op.RELEASE, messages.encode_lease(lease.id))

    def release_owner(self, owner: str) -> int:
        """Release every lease of an owner that died."""
        self._check_open()
        with self._lock:
            mine = [lease_id for lease_id, held in self._held.items() if held.owner == owner]
        for lease_id in mine:
            self._end(lease_id, Op.RELEASE, messages.encode_lease(lease_id))
        return len(mine)

    # ---- retention --------------------------------------------------------------------------------------------

    def finished(self, request: Request, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """The request is over."""
        if self._is_closed:
            return
        self._number(
            Op.FINISHED, request, lambda part: messages.encode_finished(part, finish_reason, last_turn), answers=False
        )
        attachment = self._link.attachment
        if attachment is not None:
            attachment.sent.pop(request.id, None)

    def pin(self, request: Request) -> int:
        """Keep the request's resident pages in host memory until unpin; returns the blocks pinned."""
        self._check_open()
        return self._number(Op.PIN, request, bytes)

    def unpin(self, request: Request) -> int:
        """Undo pin; returns the blocks that had one."""
        self._check_open()
        return self._number(Op.UNPIN, request, bytes)

    def forget(self, request: Request, first: int = 0) -> int:
        """Delete blocks from `first` on and all that continues them; returns the blocks deleted."""
        check_range("first", first, len(request.keys))
        self._check_open()
        return self._number(Op.FORGET, request, lambda part: messages.encode_number(first) + part)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes."""
        if num_tokens > 0 and 0 < seconds < float("inf"):
            self._tell(Op.OBSERVE_PREFILL, messages.encode_prefill(num_tokens, seconds))

    # ---- bytes ------------------------------------------------------------------------------------------------

    def slot_view(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        if self._staging is not None:
            return self._staging.slab.view(slot)
        return self._slabs[slot >> EPOCH_BITS].view(slot & ((1 << EPOCH_BITS) - 1))

    def slot_array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot as an array."""
        if self._staging is not None:
            return self._staging.slab.array(slot)
        return self._slabs[slot >> EPOCH_BITS].array(slot & ((1 << EPOCH_BITS) - 1))

    @property
    def slab_array(self) -> npt.NDArray[np.uint8] | None:
        """The whole slab, for a device to page-lock; None while there is no daemon."""
        if self._staging is not None:
            return self._staging.slab.buffer
        attachment = self._link.attachment
        return None if attachment is None or attachment.slab is None else attachment.slab.buffer

    @property
    def slab_handle(self) -> SlabHandle | SlabShare | None:
        """By what another process of this engine maps the slab (`attach_slab`); None while there is no daemon.

        Ask for each step: it is another one after the daemon has started again.
        """
        handles = self.slabs
        return handles[-1] if handles and (self._staging is not None or self.is_attached) else None

    @property
    def slabs(self) -> tuple[SlabHandle | SlabShare, ...]:
        """The slabs that slots may lie in, oldest first: the daemon's, and those of daemons before it with leases.

        Whoever maps them in another process maps no others: memory of a daemon that died stays taken until all let go.
        """
        if self._staging is not None:
            return (self._staging.slab.handle,)
        self._drop_slabs()
        with self._lock:
            return tuple(share for _, share in sorted(self._shares.items()))

    # ---- the store as a whole ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything saved so far is written behind."""
        self._check_open()
        timeout_s = _bounded(timeout_s)
        try:
            attachment = self._attached()
            _, answer = self._link.call(attachment, Op.FLUSH, messages.encode_seconds(timeout_s), timeout_s)
            return _as_number(answer) == 1
        except (DaemonDown, protocol.ProtocolError):
            return False

    def stats(self) -> dict[str, Any]:
        """The daemon's counters and gauges of this namespace; empty while there is no daemon."""
        try:
            attachment = self._attached()
            return protocol.decode_json(self._link.call(attachment, Op.STATS, b"")[1])
        except (DaemonDown, protocol.ProtocolError):
            return {}

    def close(self, timeout_s: float | None = None) -> None:
        """Detach: the daemon releases what was leased and keeps the pages. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._link.close()
        with self._lock:
            self._held.clear()
            for slab in self._slabs.values():
                slab.close()
            if self._staging is not None:
                self._staging.slab.close()

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- private ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed("the store is closed")

    def _attached(self) -> Attachment:
        try:
            return self._attach(self._link.call_timeout_s)
        except (ConfigError, LayoutMismatch) as error:
            # Another daemon than the one at the start. Loud then, quiet now: an engine's step is no place to raise.
            raise DaemonDown(str(error)) from None

    def _attach(self, timeout_s: float) -> Attachment:
        known = self._link.attachment
        attachment = self._link.attach(timeout_s)
        if attachment is not known:
            slab, epoch = attachment.slab, attachment.slot_base >> EPOCH_BITS
            if slab is not None:
                share = SlabShare(
                    self._socket, attachment.session, attachment.slot_base, slab.num_slots, slab.slot_bytes
                )
                with self._lock:
                    self._slabs[epoch], self._shares[epoch] = slab, share
            self._drop_slabs()
        if attachment.orphans:
            self._release_orphans(attachment)
        return attachment

    @property
    def _lookup_deadline_s(self) -> float:
        attachment = self._link.attachment
        return LOOKUP_DEADLINE_S if attachment is None else attachment.lookup_deadline_s

    def _lookup(self, request: Request, timeout_s: float, op: Op = Op.LOOKUP) -> Match:
        timeout_s = _bounded(timeout_s)
        try:
            _, answer = self._ask(op, request, lambda part: messages.encode_lookup(part, timeout_s), timeout_s)
            return messages.decode_match(answer)
        except (DaemonDown, protocol.ProtocolError):
            return MISS

    def _ask(
        self, op: Op, request: Request, message: Callable[[bytes], bytes], wait_s: float = 0.0
    ) -> tuple[Attachment, bytes]:
        """A call about a request, bringing the keys that the daemon does not know yet."""
        attachment = self._attached()
        num_keys = len(request.keys)
        base = min(attachment.sent.get(request.id, 0), num_keys)
        part = messages.encode_request(request, base, num_keys)
        status, answer = self._link.call(attachment, op, message(part), wait_s)
        if status is Status.RESEND:
            part = messages.encode_request(request, 0, num_keys)
            status, answer = self._link.call(attachment, op, message(part), wait_s)
        if status is not Status.OK:
            raise DaemonDown(f"{op.name} was answered {status.name}")
        attachment.note_sent(request.id, num_keys)
        return attachment, answer

    def _prepare(
        self, op: Op, request: Request, lease_id: int, first: int, end: int, owner: str
    ) -> tuple[Attachment, bytes]:
        attachment = self._link.attachment
        try:
            return self._ask(op, request, lambda part: messages.encode_prepare(part, lease_id, first, end, owner))
        except DaemonDown:
            if attachment is not None:
                attachment.orphans.append(lease_id)  # it may have been granted all the same
            raise

    def _hold(self, lease_id: int, held: _Held) -> None:
        with self._lock:
            self._held[lease_id] = held
            held.attachment.num_leases += 1

    def _end(self, lease_id: int, op: Op, message: bytes) -> None:
        with self._lock:
            held = self._held.pop(lease_id, None)
            if held is None:
                return
            held.attachment.num_leases -= 1
        self._unplace(held)
        attachment = held.attachment
        if attachment is not self._link.attachment:
            self._drop_slabs()
            return
        try:
            self._link.call(attachment, op, message)
        except DaemonDown:
            attachment.orphans.append(lease_id)

    def _unplace(self, held: _Held) -> None:
        if self._staging is not None and not self._is_closed:
            self._staging.give_back(held.pages)

    def _abandon(self, attachment: Attachment, lease_id: int) -> None:
        try:
            self._link.call(attachment, Op.RELEASE, messages.encode_lease(lease_id))
        except DaemonDown:
            attachment.orphans.append(lease_id)

    def _less(
        self, request: Request, lease_id: int, attachment: Attachment, first: int, num_blocks: int, owner: str
    ) -> LoadLease:
        """A lease that found no room here is given back, and tried once more for what fits."""
        self._abandon(attachment, lease_id)
        assert self._staging is not None
        fits = first + self._staging.num_free // len(self._layout.groups)
        if not first < fits < num_blocks:
            return LoadLease(lease_id, 0, 0, ())
        return self.prepare_load(request, fits, first=first, owner=owner)

    def _bring(self, lease_id: int, held: _Held, staging: Staging, until: float) -> None:
        """Receive the pages of a load that is ready over there."""
        assert held.status is not None
        if held.has_come:
            return
        left_s = max(until - time.monotonic(), 0.0) + self._link.call_timeout_s
        try:
            with self._link.borrow(held.attachment) as wire:
                is_whole = staging.receive(wire, lease_id, held.pages, held.status.num_blocks, left_s)
        except RequestError:
            is_whole = False
        held.has_come = True
        if not is_whole:
            held.status = LeaseStatus(LeaseState.READY, 0, 0)

    def _send(self, lease_id: int, held: _Held, staging: Staging, filled: Sequence[bool] | None) -> None:
        """Send the pages of a save, and complete it on the same connection."""
        with self._lock:
            if self._held.pop(lease_id, None) is None:
                return
            held.attachment.num_leases -= 1
        flags = [True] * len(held.pages) if filled is None else filled
        timeout_s = held.attachment.load_deadline_s + self._link.call_timeout_s
        try:
            if held.attachment is self._link.attachment:
                with self._link.borrow(held.attachment) as wire:
                    staging.send(wire, lease_id, held.pages, flags, timeout_s)
                    wire.call(Op.COMPLETE, messages.encode_complete(lease_id, flags), self._link.call_timeout_s)
        except DaemonDown:
            held.attachment.orphans.append(lease_id)
        finally:
            self._unplace(held)

    def _release_orphans(self, attachment: Attachment) -> None:
        while attachment.orphans:
            try:
                lease_id = attachment.orphans.pop()
            except IndexError:
                return
            try:
                self._link.call(attachment, Op.RELEASE, messages.encode_lease(lease_id))
            except DaemonDown:
                attachment.orphans.append(lease_id)
                raise

    def _drop_slabs(self) -> None:
        """Unmap slabs of lost attachments that no lease needs any more."""
        current = self._link.attachment
        with self._lock:
            needed = {held.attachment.slot_base >> EPOCH_BITS for held in self._held.values()}
            if current is not None:
                needed.add(current.slot_base >> EPOCH_BITS)
            for epoch in set(self._slabs) - needed:
                self._slabs.pop(epoch).close()
                del self._shares[epoch]

    def _number(self, op: Op, request: Request, message: Callable[[bytes], bytes], *, answers: bool = True) -> int:
        try:
            _, answer = self._ask(op, request, message)
            return _as_number(answer) if answers else 0
        except (DaemonDown, protocol.ProtocolError):
            return 0

    def _tell(self, op: Op, message: bytes) -> None:
        if self._is_closed:
            return
        try:
            self._link.call(self._attached(), op, message)
        except DaemonDown:
            log.debug("%s was not told to the daemon", op.name)


def _bounded(timeout_s: float) -> float:
    return min(max(0.0, timeout_s), messages.MAX_TIMEOUT_S)


def _as_number(answer: bytes) -> int:
    reader = protocol.Reader(answer)
    number = messages.read_number(reader)
    reader.end()
    return number
