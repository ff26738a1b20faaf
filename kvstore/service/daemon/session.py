"""The daemon's side of one client: its requests and its leases.

A session speaks messages (bytes in, bytes out) and knows no socket. It lives as long as one of its anchors, the
connections that a client and the ranks of its engine keep for nothing else; when the last is gone, so is whoever could
copy, and `close` releases its leases: what was being read may be evicted again, what was being written vanishes.

In the daemon's event loop: messages take microseconds under the store's lock, and what would wait answers `Pending`.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kvstore.errors import RequestError
from kvstore.plan.records import (
    CutReason,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    SaveLease,
)
from kvstore.requests import check_blocks
from kvstore.service.daemon.events import Feed
from kvstore.service.daemon.guard import goes_on
from kvstore.service.daemon.holdings import Holdings
from kvstore.service.daemon.isolation import StagedSaves
from kvstore.service.daemon.pending import Pending
from kvstore.service.daemon.requests import KnownRequests
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.daemon.usage import Usage
from kvstore.service.protocol import messages
from kvstore.service.protocol.messages import Call, encode
from kvstore.service.protocol.replies import (
    FlushReply,
    LoadReply,
    MatchReply,
    NumberReply,
    OutcomesReply,
    SaveReply,
    StatsReply,
    StatusReply,
)

log = logging.getLogger(__name__)

MAX_TICKETS = 4096

_CLOSED = LeaseStatus(LeaseState.CLOSED, 0, 0)


class Anchor(Protocol):
    """A connection that says somebody lives who may copy."""

    def tell_lost(self) -> None:
        """Ask the other side to hang up as soon as it has no copy under way."""


class ClientSession:
    """One client's requests and leases over one store. The daemon's event loop only."""

    def __init__(
        self,
        session_id: str,
        opened: OpenStore,
        client: str,
        feed: Feed,
        *,
        number: int = 0,
        pid: int | None = None,
        rendering: str = "",
        staged: StagedSaves | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        session_id: whoever knows it may attach to the session; number: names it to operators.
        client:     what the client calls itself; pid: its process, on this machine.
        rendering:  the fingerprint of how it renders chats; "" if it does not say.
        feed:       the events of the store, should it ask for them.
        staged:     memory for what it saves, if it must not write to the slab.
        """
        self.id = session_id
        self.opened = opened
        self.client = client
        self.number = number
        self.pid = pid
        self.rendering = rendering
        self.began_at = self.heard_at = now()
        self.is_overdue = False  # held a lease for too long when that was last looked at
        self.anchor: Anchor | None = None  # the client's own
        self.anchors: set[Anchor] = set()  # with those of its ranks
        self.is_orphan = False
        self.is_draining = False
        self.staged = staged
        self._holdings = Holdings(opened.store, now, staged)
        self.leases = self._holdings.leases
        self.usage = Usage()
        self._store = opened.store
        self._told = opened.store.told_of_losses()  # what the flushes of this client have said
        self._feed = feed
        self._now = now
        self.requests = KnownRequests(opened, self.holder)
        self._tickets: OrderedDict[int, None] = OrderedDict()
        self._handlers: dict[type[Call], Callable[[Any], bytes | Pending]] = {
            messages.LookupCall: self._lookup,
            messages.PeekCall: self._peek,
            messages.PrepareLoadCall: self._prepare_load,
            messages.WaitCall: self._wait,
            messages.PrepareSaveCall: self._prepare_save,
            messages.CompleteCall: self._complete,
            messages.ReleaseCall: self._release,
            messages.PrefetchCall: self._prefetch,
            messages.CancelCall: self._cancel,
            messages.FinishedCall: self._finished,
            messages.PinCall: self._pin,
            messages.UnpinCall: self._unpin,
            messages.ForgetCall: self._forget,
            messages.SetTtlCall: self._set_ttl,
            messages.HintCall: self._hint,
            messages.ObservePrefillCall: self._observe_prefill,
            messages.FlushCall: self._flush,
            messages.StatsCall: self._stats,
            messages.EventsCall: feed.answer,
            messages.KeysCall: self._keys,
        }

    @property
    def holder(self) -> str:
        """How operators are told what is kept on this client's word, also when it is gone."""
        return f"{self.client} (client {self.number})"

    def handle(self, body: bytes) -> bytes | Pending:
        """Answer a message. Raises Resend, ProtocolError, or a KVStoreError that is the client's own fault."""
        call = messages.read_call(body)
        if type(call) is not messages.EventsCall:  # which a client asks for as long as it lives, though it does nothing
            self.heard_at = self._now()
        return self._handlers[type(call)](call)

    def descriptors(self) -> list[int]:
        """Of the slab, and of the client's staging if it has one: for a connection of its own, which closes them."""
        own = [] if self.staged is None else [os.dup(self.staged.slab.fileno())]
        # A duplicate, not one that is opened anew: a process that was given one may hold a lease on it (F_SETLEASE),
        # and opening it would wait until the kernel has taken that away, 45 s.
        return [os.dup(self._store.slots.fileno()), *own]

    def orphan(self) -> None:
        """The client is gone, ranks of its engine are not: nothing is granted any more, and nothing released yet."""
        self.is_orphan = self.is_draining = True
        self._abandon()

    def close(self) -> int:
        """Release every lease; returns how many. Idempotent."""
        self._abandon()
        self._feed.close()
        num_released = self.expire(list(self.leases))
        if self.staged is not None:
            self.staged.close()
        return num_released

    def overdue(self, before: float) -> list[int]:
        """The leases that were granted before that time, of the session's clock."""
        return self._holdings.overdue(before)

    def expire(self, lease_ids: Sequence[int]) -> int:
        """Release leases without their holder's word; returns how many."""
        return self._holdings.expire(lease_ids)

    # ---- lookups and loads --------------------------------------------------------------------------------------

    def _keys(self, call: messages.KeysCall) -> bytes:
        self.requests.take(call.request)
        return b""

    def _lookup(self, call: messages.LookupCall) -> bytes | Pending:
        request = self.requests.take(call.request)
        if self.is_draining:
            return encode(MatchReply.of(Match(0, 0, cut=CutReason.NEVER_STORED)))
        match = self._store.lookup(request)
        self.usage.looked_up(request)
        if not match.pending or call.timeout_s <= 0:
            return encode(MatchReply.of(match))

        def look() -> bytes | None:
            nonlocal match
            match = self._store.lookup(request)
            return None if match.pending else encode(MatchReply.of(match))

        return Pending(look, lambda: encode(MatchReply.of(match)), call.timeout_s)

    def _peek(self, call: messages.PeekCall) -> bytes | Pending:
        request = self.requests.take(call.request)
        self.requests.drop(call.request.id)

        def answer() -> bytes:
            return encode(MatchReply.of(self._store.peek(request, 0.0)))

        def look() -> bytes | None:
            return None if self._store.ask(request) else answer()

        return look() or Pending(look, answer, call.timeout_s)

    def _prepare_load(self, call: messages.PrepareLoadCall) -> bytes:
        request = self.requests.take(call.request)
        if not self._may_grant(call.lease):
            return encode(LoadReply.of(LoadLease(0, 0, 0), _CLOSED))
        end = call.end
        if end <= len(request.keys):
            end = min(end, call.first + self._max_blocks(1))  # the rest is computed, or asked for once more
        lease = self._store.prepare_load(request, end, first=call.first, owner=self._owner(call.owner))
        self._holdings.grant(call.lease, lease)
        return encode(LoadReply.of(lease, self._store.poll(lease)))

    def _wait(self, call: messages.WaitCall) -> bytes | Pending:
        lease = self._holdings.find(call.lease)
        if not isinstance(lease, LoadLease):
            return encode(StatusReply.of(_CLOSED))
        status = self._store.poll(lease)
        if status.state is not LeaseState.WAITING or call.timeout_s <= 0:
            return encode(StatusReply.of(status))

        def look() -> bytes | None:
            now = self._store.poll(lease)
            return None if now.state is LeaseState.WAITING else encode(StatusReply.of(now))

        return Pending(look, lambda: encode(StatusReply.of(self._store.poll(lease))), call.timeout_s)

    def _prefetch(self, call: messages.PrefetchCall) -> bytes:
        ticket = self._store.prefetch(self.requests.take(call.request))
        self._tickets[ticket] = None
        if len(self._tickets) > MAX_TICKETS:
            self._tickets.popitem(last=False)
        return encode(NumberReply(ticket))

    def _cancel(self, call: messages.CancelCall) -> bytes:
        if call.ticket in self._tickets:  # its own only: tickets count through all clients
            del self._tickets[call.ticket]
            self._store.cancel(call.ticket)
        return b""

    # ---- saves, and the ends of leases --------------------------------------------------------------------------

    def _prepare_save(self, call: messages.PrepareSaveCall) -> bytes:
        first, end = call.first, call.end
        request = self.requests.take(call.request)
        if end < first:
            raise RequestError(f"blocks [{first}, {end}) is no range")
        if not self._may_grant(call.lease):
            return encode(SaveReply.of(SaveLease(0)))
        check_blocks(request, first, end - first)
        num_blocks = min(end - first, self._max_blocks(len(call.states)))
        lease = self._store.prepare_save(request, first, num_blocks, owner=self._owner(call.owner), states=call.states)
        lease = self._holdings.grant_save(call.lease, lease)
        too_many = (end - first - num_blocks) * self.opened.layout.block_groups
        return encode(SaveReply.of(replace(lease, skipped=lease.skipped + too_many) if too_many else lease))

    def _complete(self, call: messages.CompleteCall) -> bytes | Pending:
        held = self.leases.get(call.lease)
        if held is None or held.is_ending:
            return b""
        if held.told is not None:
            return self._holdings.end_save(call.lease, call.filled, lambda: self._copied(held.lease))
        self._store.complete(held.lease, filled=call.filled)  # refuses flags of another length: the lease stays
        self.usage.completed(held.lease, self.opened.layout)
        del self.leases[call.lease]
        return b""

    def _copied(self, lease: LoadLease | SaveLease) -> None:
        self.usage.completed(lease, self.opened.layout)
        self.opened.watch.wake()

    def _release(self, call: messages.ReleaseCall) -> bytes:
        self._holdings.release(call.lease)
        return b""

    # ---- retention, and the store as a whole --------------------------------------------------------------------

    def _finished(self, call: messages.FinishedCall) -> bytes:
        request = self.requests.take(call.request)
        self._store.keep.finished(
            request, finish_reason=call.finish_reason, last_turn=call.last_turn, reply_tokens=call.reply_tokens
        )
        self.requests.drop(call.request.id)
        return b""

    def _pin(self, call: messages.PinCall) -> bytes:
        return encode(NumberReply(self._store.keep.pin(self.requests.take(call.request))))

    def _unpin(self, call: messages.UnpinCall) -> bytes:
        return encode(NumberReply(self._store.keep.unpin(self.requests.take(call.request))))

    def _forget(self, call: messages.ForgetCall) -> bytes:
        return encode(NumberReply(self._store.keep.forget(self.requests.take(call.request), call.first)))

    def _set_ttl(self, call: messages.SetTtlCall) -> bytes:
        return encode(NumberReply(self._store.keep.set_ttl(self.requests.take(call.request), call.ttl_s)))

    def _hint(self, call: messages.HintCall) -> bytes:
        part = call.request
        request = None if part is None else self.requests.take(part)  # may ask for all keys: nothing is counted before
        self._store.count_hints([one.outcome() for one in call.ended])
        if part is None or request is None:
            return encode(OutcomesReply([]))
        wishes, most = [part.wish() for part in call.wishes], self._store.hint_limits.max_actions
        outcomes = [self._store.obey(request, wish) for wish in wishes[:most]]
        refused = [wish.rejected(f"{most} actions are done at once") for wish in wishes[most:]]
        self._store.count_hints(refused)
        outcomes += refused
        if not any(wish.is_own for wish in wishes):
            self.requests.drop(part.id)
        return encode(OutcomesReply([messages.OutcomePart.of(outcome) for outcome in outcomes]))

    def _observe_prefill(self, call: messages.ObservePrefillCall) -> bytes:
        self._store.observe_prefill(call.num_tokens, call.seconds)
        return b""

    def _flush(self, call: messages.FlushCall) -> bytes | Pending:
        flushing = self._store.start_flush()

        def look(*, at_once: bool = False) -> bytes | None:
            result = self._store.flush_result(flushing, self._told, at_once=at_once)
            return None if result is None else encode(FlushReply.of(result))

        return look() or Pending(look, lambda: look(at_once=True) or b"", call.timeout_s)

    def _stats(self, _: messages.StatsCall) -> bytes:
        return encode(StatsReply(self._store.stats()))

    # ---- private ------------------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        """The client goes on with none of its requests: others need not wait for what it was computing."""
        for request_id in self.requests.ids:
            with goes_on(log, "client %s: request %d is not abandoned", self.client, request_id):
                self.requests.end(request_id)

    def _may_grant(self, lease_id: int) -> bool:
        return self._holdings.may_grant(lease_id) and not self.is_draining

    def _max_blocks(self, num_states: int) -> int:
        """Blocks of a lease whose pages, and so many states, one answer can tell."""
        layout = self.opened.layout
        num_pieces = num_states * (len(layout.groups) - layout.block_groups)
        return max(0, messages.MAX_LEASE_PAGES - num_pieces) // max(1, layout.block_groups)

    def _owner(self, owner: str) -> str:
        return f"{self.id}/{owner}"
