"""RemoteStore: the store's face (kvstore/base.py) over a link to a node daemon.

Prompts are hashed here, planning happens in the daemon, and bytes are copied by the caller between its own pages and
the slab, which is mapped into this process. While the daemon is away everything is a miss: lookups match nothing,
leases have no page. The first call that is not answered in time finds that out; after it none waits, until a thread
of the link (link.py) has found the daemon again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kvstore.errors import RequestError, StoreClosed
from kvstore.forks import harmless
from kvstore.hinting import Aimed, Hinting
from kvstore.hints.outcome import HintOutcome
from kvstore.layout import Layout
from kvstore.plan.journal import BlockEvent
from kvstore.plan.records import CutReason, FlushResult, LeaseStatus, LoadLease, Match, Request, SaveLease
from kvstore.requests import check_blocks, check_range
from kvstore.service.client.attachment import Attachment, DaemonDown
from kvstore.service.client.calls import Calls
from kvstore.service.client.connection import Dial
from kvstore.service.client.events import Follower
from kvstore.service.client.hints import HintCalls
from kvstore.service.client.keep import ClientKeep
from kvstore.service.client.leases import CLOSED, Leases, OpenLease
from kvstore.service.client.link import DaemonLink
from kvstore.service.client.memory import SharedMemory
from kvstore.service.client.slots import ClientSlots
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import ProtocolError, encode_json
from kvstore.service.protocol.namespaces import check_pair, layout_to_json, namespace_to_json
from kvstore.service.protocol.replies import FlushReply, LoadReply, MatchReply, SaveReply, StatsReply
from kvstore.waits import Deadlines, Waits
from radix.namespace import Namespace

log = logging.getLogger(__name__)

MISS = Match(0, 0, cut=CutReason.NEVER_STORED)
NO_DAEMON = Deadlines(0.05, 0.0)  # while none has told its own


class RemoteStore(Hinting, Waits):
    """A KVStore (see base.py) kept by a daemon on this machine. Any thread.

    Made by `kvstore.connect`. A daemon that cannot be reached is no error: the store is empty until it can.
    Raises ConfigError or LayoutMismatch if the daemon refuses this layout or namespace.
    """

    def __init__(
        self,
        dial: Dial,
        layout: Layout,
        namespace: Namespace,
        memory: SharedMemory,
        *,
        call_timeout_s: float = 1.0,
        retry_max_s: float = 2.0,
        client: str = "",
        rendering: str = "",
    ) -> None:
        """Attach. memory: where the pages of leases lie in this process; closed with the store."""
        check_pair(layout, namespace)
        super().__init__(namespace)
        self._layout = layout
        self.namespace = namespace
        self._is_closed = False
        self._greeting = {"layout": layout_to_json(layout), "namespace": namespace_to_json(namespace), "client": client}
        if rendering:
            self._greeting["rendering"] = rendering
        self._link = DaemonLink(
            dial,
            encode_json(self._greeting),
            call_timeout_s=call_timeout_s,
            retry_max_s=retry_max_s,
            on_change=self._changed,
        )
        self._leases = Leases(self._link, memory)
        self._calls = Calls(self._link)
        self.slots = ClientSlots(self._link, memory, self._leases)
        self.keep = ClientKeep(self._calls, self._check_open)
        self._hints = HintCalls(self._calls)
        self._follower: Follower | None = None
        try:
            self._link.attach()
        except DaemonDown:
            pass  # the store starts empty
        except BaseException:
            self.close()
            raise

    def _changed(self, attachment: Attachment | None) -> None:
        if attachment is not None:
            # Of requests that begin now; while no daemon is known they take exact pages. It never becomes less: the
            # engine may still have, in a cache of its own, what it computed after lossy pages of an earlier daemon.
            self.loss = max(self.loss, attachment.loss)
        self._leases.changed(attachment)

    @property
    def layout(self) -> Layout:
        """The geometry of this store's pages."""
        return self._layout

    @property
    def is_attached(self) -> bool:
        """True if there is a daemon, though it may not answer at the moment. Does not wait."""
        attachment = self._link.attachment
        return attachment is not None and not attachment.is_lost

    @property
    def num_attached(self) -> int:
        """How often a daemon was attached to; more than one after a restart."""
        return self._link.num_attached

    # ---- lookups and loads ------------------------------------------------------------------------------------

    def lookup(self, request: Request) -> Match:
        """The longest prefix worth loading."""
        return self._lookup_within(request, 0.0)

    def prepare_load(self, request: Request, num_blocks: int, *, first: int = 0, owner: str = "") -> LoadLease:
        """Pin blocks [first, num_blocks) in host slots and start fetching what is not there."""
        check_range("num_blocks", num_blocks, len(request.keys))
        check_range("first", first, num_blocks)
        self._check_open()
        lease_id = self._leases.next_id()
        try:
            attachment, answer = self._calls.prepare(
                messages.PrepareLoadCall, request, lease_id, first, num_blocks, owner
            )
            granted = LoadReply.read(answer)
            lease = granted.lease(lease_id, attachment.slot_base)
        except (DaemonDown, ProtocolError):
            return LoadLease(lease_id, 0, 0)
        if not self._leases.hold(lease_id, OpenLease(attachment, owner, granted.status.status())):
            return LoadLease(lease_id, 0, 0)
        return lease

    def poll(self, lease: LoadLease) -> LeaseStatus:
        """The progress of a load lease."""
        return self._poll_within(lease, 0.0) if not self._is_closed else CLOSED

    def prefetch(self, request: Request) -> int:
        """Start bringing the known prefix into host memory; returns a ticket, 0 if there is no daemon."""
        self._check_open()
        return self._calls.number(request, messages.PrefetchCall)

    def cancel(self, ticket: int) -> None:
        """Stop a prefetch."""
        if ticket and not self._is_closed:
            self._calls.tell(messages.CancelCall(ticket))

    def _carry_out(self, aimed: Sequence[Aimed | HintOutcome]) -> list[HintOutcome]:
        self._check_open()
        return self._hints.carry_out(aimed)

    # ---- saves ------------------------------------------------------------------------------------------------

    def prepare_save(
        self, request: Request, first: int, num_blocks: int, *, owner: str = "", states: Sequence[int] = ()
    ) -> SaveLease:
        """Give slots for those pages of blocks [first, first + num_blocks) that host memory does not have."""
        check_blocks(request, first, num_blocks)
        self._check_open()
        lease_id = self._leases.next_id()
        try:
            attachment, answer = self._calls.prepare(
                partial(messages.PrepareSaveCall, states=list(states)[: messages.MAX_STATES]),
                request,
                lease_id,
                first,
                first + num_blocks,
                owner,
            )
            lease = SaveReply.read(answer).lease(lease_id, attachment.slot_base)
        except (DaemonDown, ProtocolError):
            return SaveLease(lease_id, skipped=num_blocks * self._layout.block_groups)
        if not self._leases.hold(lease_id, OpenLease(attachment, owner)):
            return SaveLease(lease_id, skipped=lease.skipped + len(lease.pages))
        return lease

    def complete(self, lease: LoadLease | SaveLease, *, filled: Sequence[bool] | None = None) -> None:
        """End a lease well. A lease that ended already is ignored."""
        if filled is not None and len(filled) != len(lease.pages):
            raise RequestError(f"filled has {len(filled)} entries; the lease has {len(lease.pages)} pages")
        call = messages.CompleteCall(lease.id, messages.flags(filled))
        if isinstance(lease, LoadLease):
            self._leases.end(lease.id, call)
        else:
            self._leases.end(lease.id, call, [True] * len(lease.pages) if filled is None else filled)

    def release(self, lease: LoadLease | SaveLease) -> None:
        """End a lease badly. A lease that ended already is ignored."""
        self._leases.end(lease.id, messages.ReleaseCall(lease.id))

    def release_owner(self, owner: str) -> int:
        """Release every lease of an owner that died."""
        self._check_open()
        mine = self._leases.owned_by(owner)
        for lease_id in mine:
            self._leases.end(lease_id, messages.ReleaseCall(lease_id))
        return len(mine)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell how fast the engine computes."""
        if 0 < num_tokens < 1 << 32 and 0 < seconds <= messages.MAX_PREFILL_S and not self._is_closed:
            self._calls.tell(messages.ObservePrefillCall(num_tokens, seconds))

    # ---- events -----------------------------------------------------------------------------------------------

    def want_events(self) -> None:
        """Ask the daemon for events from now on, for `take_events`. Idempotent."""
        self._check_open()
        if self._follower is None:
            # A daemon that is attached to later notes events before it can be asked for them: none is missed.
            self._link.greeting = encode_json({**self._greeting, "events": True})
            self._follower = Follower(self._link)

    def take_events(self) -> list[BlockEvent]:
        """The events of the daemon's tiers since the last call. Does not wait.

        `DROPPED` stands for events that were lost, and for all that a daemon had that is gone.
        """
        return [] if self._follower is None else self._follower.take()

    # ---- the store as a whole ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float) -> FlushResult:
        """Wait until everything saved and deleted so far is so on the daemon's tiers, or cannot be made so now.

        What was saved to a daemon that has gone since, unflushed, is missing as "unknown": some of it may be there.
        """
        self._check_open()
        timeout_s = messages.bounded(timeout_s)
        try:
            attachment = self._link.attached()
            num_pages = self._leases.num_unflushed(attachment)
            _, answer = self._link.call(attachment, messages.FlushCall(timeout_s), timeout_s)
            result = FlushReply.read(answer).result()
        except (DaemonDown, ProtocolError) as error:
            return FlushResult(False, error=f"the daemon does not answer: {error}")
        num_unknown = self._leases.flushed(attachment, num_pages if result else 0)
        if num_unknown:
            return replace(result, ok=False, missing={**result.missing, "daemon": {"unknown": num_unknown}})
        return result

    def stats(self) -> dict[str, Any]:
        """The daemon's counters and gauges of this namespace; empty while there is no daemon."""
        try:
            _, answer = self._link.call(self._link.attached(), messages.StatsCall())
            return StatsReply.read(answer).values
        except (DaemonDown, ProtocolError):
            return {}

    @harmless
    def close(self, timeout_s: float | None = None) -> None:
        """Detach: the daemon releases what was leased and keeps the pages. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._link.close()
        if self._follower is not None:
            self._follower.close()
        self._leases.close()

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the looks that waits are made of (waits.py) ----------------------------------------------------------

    @property
    def _deadlines(self) -> Deadlines:
        attachment = self._link.attachment
        return NO_DAEMON if attachment is None else attachment.deadlines

    def _lookup_within(self, request: Request, wait_s: float) -> Match:
        self._check_open()
        return self._look(messages.LookupCall, request, wait_s)

    def _peek_within(self, request: Request, wait_s: float) -> Match:
        self._check_open()
        try:
            return self._look(messages.PeekCall, request, wait_s)
        finally:
            self._calls.unsend(request)

    def _poll_within(self, lease: LoadLease, wait_s: float) -> LeaseStatus:
        self._check_open()
        try:
            return self._leases.wait(lease.id, wait_s)
        except (DaemonDown, ProtocolError):
            return CLOSED

    # ---- private ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed("the store is closed")

    def _look(self, kind: type[messages.LookupCall | messages.PeekCall], request: Request, wait_s: float) -> Match:
        """Ask, and let the daemon wait: it knows when something has changed."""
        wait_s = messages.bounded(wait_s)
        try:
            _, answer = self._calls.ask(request, lambda part: kind(part, wait_s), wait_s)
            return MatchReply.read(answer).match()
        except (DaemonDown, ProtocolError):
            return MISS
