"""The leases that a daemon holds for one client, by the client's own numbers.

The hard thing: a client whose call timed out does not know whether a lease was granted. It releases the number it had
chosen, over another connection, and that message may come first; so the number of a lease that is not known is kept
for a while, and a lease that is already released is not granted.

In the daemon's event loop.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.errors import RequestError
from kvstore.plan.records import LoadLease, SaveLease
from kvstore.service.daemon.guard import goes_on
from kvstore.service.daemon.isolation import StagedSaves
from kvstore.service.daemon.pending import Pending
from kvstore.service.protocol.messages import MAX_TIMEOUT_S
from kvstore.store import LocalStore

log = logging.getLogger(__name__)

MAX_LEASES = 16_384
MAX_TOMBSTONES = 1024


@dataclass(slots=True)
class ClientLease:
    """A lease of the client.

    told:     of a save whose pages lie in the client's staging: the lease as the client got it.
    is_ending: those pages are being copied, and the lease ends with that.
    """

    lease: LoadLease | SaveLease
    granted_at: float
    told: SaveLease | None = None
    is_ending: bool = False


class Holdings:
    """Open leases of one client."""

    def __init__(self, store: LocalStore, now: Callable[[], float], staged: StagedSaves | None) -> None:
        """staged: where the pages of saves lie, unless in the slab."""
        self.leases: dict[int, ClientLease] = {}
        self._store = store
        self._now = now
        self._staged = staged
        self._tombstones: OrderedDict[int, None] = OrderedDict()

    def may_grant(self, lease_id: int) -> bool:
        """False if that number was released before it was granted. Raises RequestError for one that is in use."""
        if lease_id in self.leases:
            raise RequestError(f"lease {lease_id} is open already; each call needs a number of its own")
        if len(self.leases) >= MAX_LEASES:
            raise RequestError(f"this client holds {len(self.leases)} leases; it may hold {MAX_LEASES}")
        return self._tombstones.pop(lease_id, self) is self

    def grant(self, lease_id: int, lease: LoadLease | SaveLease) -> None:
        """Hold a lease."""
        self.leases[lease_id] = ClientLease(lease, self._now())

    def grant_save(self, lease_id: int, lease: SaveLease) -> SaveLease:
        """Hold a lease; returns it as the client is told."""
        self.grant(lease_id, lease)
        if self._staged is None:
            return lease
        told = self.leases[lease_id].told = self._staged.place(lease)
        return told

    def end_save(self, lease_id: int, filled: Sequence[bool] | None, then: Callable[[], None]) -> Pending:
        """Copy what a client filled in its staging into the slab, and publish it; then call `then`, and answer.

        Whatever becomes of the client meanwhile, the slots of both sides are taken until the copy has ended. Raises
        RequestError for flags of another length.
        """
        held, staged = self.leases[lease_id], self._staged
        lease, told = held.lease, held.told
        assert isinstance(lease, SaveLease)
        assert staged is not None
        assert told is not None
        flags = [True] * len(told.pages) if filled is None else list(filled)
        if len(flags) != len(told.pages):
            raise RequestError(f"filled has {len(flags)} entries; the lease has {len(told.pages)} pages")
        held.is_ending = True
        is_over = False

        def copied(is_well: bool) -> None:
            with goes_on(log, "lease %d is not completed", lease_id):
                if is_well:
                    self._store.complete(lease, filled=[*flags, *[False] * (len(lease.pages) - len(flags))])
                else:
                    self._store.release(lease)
            staged.give_back(told)
            if self.leases.get(lease_id) is held:
                del self.leases[lease_id]
            nonlocal is_over
            is_over = True
            then()

        staged.copy(lease, told, flags, copied)
        return Pending(lambda: b"" if is_over else None, lambda: b"", MAX_TIMEOUT_S)

    def find(self, lease_id: int) -> LoadLease | SaveLease | None:
        """The lease of that number."""
        held = self.leases.get(lease_id)
        return None if held is None else held.lease

    def release(self, lease_id: int) -> None:
        """End a lease badly, now or before it is granted."""
        if lease_id in self.leases:
            self.expire([lease_id])
            return
        self._tombstones[lease_id] = None
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def overdue(self, before: float) -> list[int]:
        """The leases that were granted before that time."""
        return [lease_id for lease_id, held in self.leases.items() if held.granted_at < before]

    def expire(self, lease_ids: Sequence[int]) -> int:
        """Release leases without their holder's word; returns how many. One that cannot be released keeps no other."""
        for lease_id in lease_ids:
            held = self.leases.pop(lease_id)
            if held.is_ending:
                continue  # slots that are being copied to must go to nobody else; it ends by itself
            lease = held.lease
            with goes_on(log, "lease %d is not released; its %d slots may stay out of use", lease_id, len(lease.pages)):
                self._store.release(lease)
            if held.told is not None and self._staged is not None:
                self._staged.give_back(held.told)
        return len(lease_ids)
