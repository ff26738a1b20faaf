"""The leases that a client has open, and the memory in which their pages lie.

A lease belongs to the attachment it was granted under. Its slots stay mapped until it ends, even if the daemon is gone
by then: what was ready may still be copied, and what is being saved is written to where nobody looks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from kvstore.forks import in_child
from kvstore.plan.records import LeaseState, LeaseStatus
from kvstore.service.client.attachment import Attachment, DaemonDown
from kvstore.service.client.link import DaemonLink
from kvstore.service.client.memory import SharedMemory
from kvstore.service.client.slab import SlabShare
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import Kind
from kvstore.service.protocol.replies import StatusReply

CLOSED = LeaseStatus(LeaseState.CLOSED, 0, 0)


@dataclass(slots=True)
class OpenLease:
    """A lease that is open. status: of a load, as last heard."""

    attachment: Attachment
    owner: str
    status: LeaseStatus | None = None


class Leases:
    """Open leases. Any thread.

    memory: where pages lie in this process; closed with the leases.
    """

    def __init__(self, link: DaemonLink, memory: SharedMemory) -> None:
        self._link = link
        self._memory = memory
        self._ids = count(1)
        self._held: dict[int, OpenLease] = {}
        self._saved_to: Attachment | None = None
        self._num_saved = 0  # pages, to that daemon, since its last flush that was true
        self._num_unknown = 0  # pages saved to daemons before it, unflushed
        self._lock = threading.Lock()  # of all these; never held while calling
        in_child(self, Leases._begin_anew)

    def next_id(self) -> int:
        """The number of one more lease."""
        return next(self._ids)

    def hold(self, lease_id: int, held: OpenLease) -> bool:
        """Note a lease; False if its daemon was lost meanwhile, and its slab with it."""
        with self._lock:
            is_held = held.attachment is self._link.attachment
            if is_held:
                self._held[lease_id] = held
            return is_held

    def owned_by(self, owner: str) -> list[int]:
        """The leases of an owner."""
        with self._lock:
            return [lease_id for lease_id, held in self._held.items() if held.owner == owner]

    def wait(self, lease_id: int, timeout_s: float) -> LeaseStatus:
        """Wait until a load is ready, at most `timeout_s`."""
        held = self._held.get(lease_id)
        if held is None or held.status is None:
            return CLOSED
        if held.status.state is LeaseState.READY:
            return held.status  # final: no need to ask
        if held.attachment is not self._link.attachment:
            return CLOSED
        timeout_s = messages.bounded(timeout_s)
        _, answer = self._link.call(held.attachment, messages.WaitCall(lease_id, timeout_s), timeout_s)
        held.status = StatusReply.read(answer).status()
        return held.status

    def end(
        self, lease_id: int, call: messages.CompleteCall | messages.ReleaseCall, filled: Sequence[bool] | None = None
    ) -> None:
        """End a lease here and there; one that has ended is ignored. filled: which pages of a save are there."""
        with self._lock:
            held = self._held.pop(lease_id, None)
            if held is None:
                return
            num_saved = 0 if filled is None else sum(map(bool, filled))
            self._note_saved(held.attachment, num_saved)
            if held.attachment is not self._link.attachment:
                self._drop_slabs()
                return
        try:
            with self._link.borrow(held.attachment) as wire:
                # A daemon that keeps its clients apart copies what was saved before it answers.
                copying_s = held.attachment.deadlines.load_s if held.attachment.is_isolated and filled else 0.0
                wire.call(Kind.CALL, messages.encode(call), self._link.call_timeout_s + copying_s)
        except DaemonDown:
            self._link.orphan(held.attachment, lease_id)
            with self._lock:
                self._num_unknown += num_saved

    def num_unflushed(self, attachment: Attachment) -> int:
        """How many pages were saved to a daemon since its last flush that was true."""
        with self._lock:
            self._note_saved(attachment, 0)
            return self._num_saved

    def flushed(self, attachment: Attachment, num_pages: int) -> int:
        """A daemon has flushed so many pages; returns how many may be lost: with one before it, or on the way."""
        with self._lock:
            if attachment is self._saved_to:
                self._num_saved = max(0, self._num_saved - num_pages)
            num_unknown, self._num_unknown = self._num_unknown, 0
            return num_unknown

    @property
    def slabs(self) -> tuple[SlabShare, ...]:
        """Those that slots may lie in, oldest first: the daemon's, and of daemons before it those with leases."""
        with self._lock:
            self._drop_slabs()
            return self._memory.handles

    def changed(self, attachment: Attachment | None) -> None:
        """A daemon is attached to, or lost."""
        with self._lock:
            if attachment is not None:
                self._memory.enter(attachment)
            self._drop_slabs()

    def close(self) -> None:
        """Forget them, and let the memory go. Idempotent."""
        with self._lock:
            self._held.clear()
            self._memory.close()

    # ---- private ------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """In a forked child: the leases are its parent's, as are the slots they name."""
        self._lock = threading.Lock()
        self._held = {}
        self._num_saved = self._num_unknown = 0

    def _note_saved(self, attachment: Attachment, num_pages: int) -> None:
        """Under the lock."""
        if attachment is not self._saved_to:
            self._num_unknown += self._num_saved
            self._saved_to, self._num_saved = attachment, 0
        self._num_saved += num_pages

    def _drop_slabs(self) -> None:
        """Free the memory of lost attachments that no lease needs any more. Under the lock."""
        current = self._link.attachment
        attachments = [held.attachment for held in self._held.values()]
        self._memory.keep([*attachments, current] if current is not None else attachments)
