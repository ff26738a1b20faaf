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
from typing import Protocol

from kvstore.errors import RequestError
from kvstore.plan.records import (
    CutReason,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
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
from kvstore.service.protocol import frames, messages
from kvstore.service.protocol.frames import ProtocolError, Reader, Verb

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
        staged: StagedSaves | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        session_id: whoever knows it may attach to the session; number: names it to operators.
        client:     what the client calls itself; pid: its process, on this machine.
        feed:       the events of the store, should it ask for them.
        staged:     memory for what it saves, if it must not write to the slab.
        """
        self.id = session_id
        self.opened = opened
        self.client = client
        self.number = number
        self.pid = pid
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
        self._handlers: dict[Verb, Callable[[Reader], bytes | Pending]] = {
            Verb.LOOKUP: self._lookup,
            Verb.PEEK: self._peek,
            Verb.PREPARE_LOAD: self._prepare_load,
            Verb.WAIT: self._wait,
            Verb.PREPARE_SAVE: self._prepare_save,
            Verb.COMPLETE: self._complete,
            Verb.RELEASE: self._release,
            Verb.RELEASE_OWNER: self._release_owner,
            Verb.PREFETCH: self._prefetch,
            Verb.CANCEL: self._cancel,
            Verb.FINISHED: self._finished,
            Verb.PIN: self._pin,
            Verb.UNPIN: self._unpin,
            Verb.FORGET: self._forget,
            Verb.OBSERVE_PREFILL: self._observe_prefill,
            Verb.FLUSH: self._flush,
            Verb.STATS: self._stats,
            Verb.EVENTS: feed.answer,
            Verb.KEYS: self._keys,
        }

    @property
    def holder(self) -> str:
        """How operators are told what is kept on this client's word, also when it is gone."""
        return f"{self.client} (client {self.number})"

    def handle(self, op: Verb, body: bytes) -> bytes | Pending:
        """Answer a message. Raises Resend, ProtocolError, or a KVStoreError that is the client's own fault."""
        handler = self._handlers.get(op)
        if handler is None:
            raise ProtocolError(f"a session has no {op.name}")
        if op is not Verb.EVENTS:  # which a client asks for as long as it lives, though it does nothing
            self.heard_at = self._now()
        return handler(Reader(body))

    def descriptors(self) -> list[int]:
        """Of the slab, and of the client's staging if it has one: for a connection of its own, which closes them."""
        own = [] if self.staged is None else [os.dup(self.staged.slab.fileno())]
        return [self._store.slab_descriptor(), *own]

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

    def _keys(self, reader: Reader) -> bytes:
        self._request(reader)
        return b""

    def _lookup(self, reader: Reader) -> bytes | Pending:
        timeout_s = messages.read_timeout(reader)
        request = self._request(reader)
        if self.is_draining:
            return messages.encode_match(Match(0, 0, cut=CutReason.NEVER_STORED))
        match = self._store.lookup(request)
        self.usage.looked_up(request)
        if not match.pending or timeout_s <= 0:
            return messages.encode_match(match)

        def look() -> bytes | None:
            nonlocal match
            match = self._store.lookup(request)
            return None if match.pending else messages.encode_match(match)

        return Pending(look, lambda: messages.encode_match(match), timeout_s)

    def _peek(self, reader: Reader) -> bytes | Pending:
        timeout_s = messages.read_timeout(reader)
        part = messages.read_request(reader)
        reader.end()
        request = self.requests.take(part)
        self.requests.drop(part.id)

        def answer() -> bytes:
            return messages.encode_match(self._store.peek(request, 0.0))

        def look() -> bytes | None:
            return None if self._store.ask(request) else answer()

        return look() or Pending(look, answer, timeout_s)

    def _prepare_load(self, reader: Reader) -> bytes:
        lease_id, first, end, owner = messages.read_prepare(reader)
        request = self._request(reader)
        if not self._may_grant(lease_id):
            return messages.encode_load(LoadLease(0, 0, 0, ()), _CLOSED)
        if end <= len(request.keys):
            end = min(end, first + self._max_blocks)  # the rest is computed, or asked for once more
        lease = self._store.prepare_load(request, end, first=first, owner=self._owner(owner))
        self._holdings.grant(lease_id, lease, owner)
        return messages.encode_load(lease, self._store.poll(lease))

    def _wait(self, reader: Reader) -> bytes | Pending:
        lease_id, timeout_s = messages.read_wait(reader)
        reader.end()
        lease = self._holdings.find(lease_id)
        if not isinstance(lease, LoadLease):
            return messages.encode_status(_CLOSED)
        status = self._store.poll(lease)
        if status.state is not LeaseState.WAITING or timeout_s <= 0:
            return messages.encode_status(status)

        def look() -> bytes | None:
            now = self._store.poll(lease)
            return None if now.state is LeaseState.WAITING else messages.encode_status(now)

        return Pending(look, lambda: messages.encode_status(self._store.poll(lease)), timeout_s)

    def _prefetch(self, reader: Reader) -> bytes:
        request = self._request(reader)
        ticket = self._store.prefetch(request)
        self._tickets[ticket] = None
        if len(self._tickets) > MAX_TICKETS:
            self._tickets.popitem(last=False)
        return messages.encode_number(ticket)

    def _cancel(self, reader: Reader) -> bytes:
        ticket = messages.read_number(reader)
        reader.end()
        if ticket in self._tickets:  # its own only: tickets count through all clients
            del self._tickets[ticket]
            self._store.cancel(ticket)
        return b""

    # ---- saves, and the ends of leases --------------------------------------------------------------------------

    def _prepare_save(self, reader: Reader) -> bytes:
        lease_id, first, end, owner = messages.read_prepare(reader)
        request = self._request(reader)
        if end < first:
            raise RequestError(f"blocks [{first}, {end}) is no range")
        if not self._may_grant(lease_id):
            return messages.encode_save(SaveLease(0, ()))
        check_blocks(request, first, end - first)
        num_blocks = min(end - first, self._max_blocks)
        lease = self._store.prepare_save(request, first, num_blocks, owner=self._owner(owner))
        lease = self._holdings.grant_save(lease_id, lease, owner)
        too_many = (end - first - num_blocks) * len(self.opened.layout.groups)
        return messages.encode_save(replace(lease, skipped=lease.skipped + too_many) if too_many else lease)

    def _complete(self, reader: Reader) -> bytes | Pending:
        lease_id, filled = messages.read_complete(reader)
        reader.end()
        held = self.leases.get(lease_id)
        if held is None or held.is_ending:
            return b""
        if held.told is not None:
            return self._holdings.end_save(lease_id, filled, lambda: self._copied(held.lease))
        self._store.complete(held.lease, filled=filled)  # refuses flags of another length: the lease stays
        self.usage.completed(held.lease, self.opened.layout)
        del self.leases[lease_id]
        return b""

    def _copied(self, lease: LoadLease | SaveLease) -> None:
        self.usage.completed(lease, self.opened.layout)
        self.opened.watch.wake()

    def _release(self, reader: Reader) -> bytes:
        lease_id = messages.read_lease(reader)
        reader.end()
        self._holdings.release(lease_id)
        return b""

    def _release_owner(self, reader: Reader) -> bytes:
        owner = reader.text(messages.read_number(reader))
        reader.end()
        return messages.encode_number(self.expire(self._holdings.owned_by(owner)))

    # ---- retention, and the store as a whole --------------------------------------------------------------------

    def _finished(self, reader: Reader) -> bytes:
        finish_reason, last_turn = messages.read_finished(reader)
        part = messages.read_request(reader)
        reader.end()
        request = self.requests.take(part)
        self._store.finished(request, finish_reason=finish_reason, last_turn=last_turn)
        self.requests.drop(part.id)
        return b""

    def _pin(self, reader: Reader) -> bytes:
        return messages.encode_number(self._store.pin(self._request(reader)))

    def _unpin(self, reader: Reader) -> bytes:
        return messages.encode_number(self._store.unpin(self._request(reader)))

    def _forget(self, reader: Reader) -> bytes:
        first = messages.read_number(reader)
        return messages.encode_number(self._store.forget(self._request(reader), first))

    def _observe_prefill(self, reader: Reader) -> bytes:
        num_tokens, seconds = messages.read_prefill(reader)
        reader.end()
        if not 0 < num_tokens < 1 << 32 or not 0 < seconds < float("inf"):
            raise RequestError(f"observe_prefill of {num_tokens} tokens in {seconds} s; both must be positive")
        self._store.observe_prefill(num_tokens, seconds)
        return b""

    def _flush(self, reader: Reader) -> bytes | Pending:
        timeout_s = messages.read_seconds(reader)
        reader.end()
        flushing = self._store.start_flush()

        def look(*, at_once: bool = False) -> bytes | None:
            result = self._store.flush_result(flushing, self._told, at_once=at_once)
            return None if result is None else messages.encode_flush(result)

        return look() or Pending(look, lambda: look(at_once=True) or b"", timeout_s)

    def _stats(self, reader: Reader) -> bytes:
        reader.end()
        return frames.encode_json(self._store.stats())

    # ---- private ------------------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        """The client goes on with none of its requests: others need not wait for what it was computing."""
        for request_id in self.requests.ids:
            with goes_on(log, "client %s: request %d is not abandoned", self.client, request_id):
                self.requests.end(request_id)

    def _request(self, reader: Reader) -> Request:
        part = messages.read_request(reader)
        reader.end()
        return self.requests.take(part)

    def _may_grant(self, lease_id: int) -> bool:
        return self._holdings.may_grant(lease_id) and not self.is_draining

    @property
    def _max_blocks(self) -> int:
        """Blocks of a lease whose pages one answer can tell."""
        return messages.MAX_LEASE_PAGES // len(self.opened.layout.groups)

    def _owner(self, owner: str) -> str:
        return f"{self.id}/{owner}"
