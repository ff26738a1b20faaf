"""Transfers that are under way, and the ones waiting to be handed to the lanes.

Every transfer the planner makes gets a number and an InFlight that remembers which pages it is about; its outcome finds
them again by that number. A transfer leaves the planner through `take`, exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.page import PageKey, PageMeta
from kvstore.plan.records import Op, Priority, Transfer
from kvstore.plan.state import Page


@dataclass(slots=True, eq=False)
class InFlight:
    """One transfer under way. `pages` is parallel to the transfer's keys, but empty for a PROBE."""

    transfer: Transfer
    pages: Sequence[Page]
    context: object = None


class TransferBook:
    """The book of transfers.

    outbox:   those that the lanes do not have yet; they stay until `sent`.
    promoted: numbers of prefetches that a request now waits for; they stay until `sent`, too.
    stalled:  those that were inside their tier when it went down. They may take for ever; nobody should wait for them.
    """

    def __init__(self) -> None:
        self.outbox: list[Transfer] = []
        self.promoted: list[int] = []
        self.stalled: set[int] = set()
        self._has_new_stalled = False
        self._transfers: dict[int, InFlight] = {}
        self._next_id = 1
        self._last_sent = 0  # number of the last transfer that the lanes have; those of an older number they have, too

    def send(
        self,
        op: Op,
        tier: str,
        keys: Sequence[PageKey],
        pages: Sequence[Page] = (),
        *,
        priority: Priority,
        deadline: float,
        slots: Sequence[int] = (),
        metas: Sequence[PageMeta] = (),
        evict: Sequence[PageKey] = (),
        expires_at: float = 0.0,
        token: bytes = b"",
        lease_s: float = 0.0,
        context: object = None,
    ) -> Transfer:
        """Make a transfer and put it in the outbox."""
        transfer = Transfer(
            self._next_id,
            op,
            tier,
            tuple(keys),
            priority,
            deadline,
            tuple(slots),
            tuple(metas),
            tuple(evict),
            expires_at,
            token,
            lease_s,
        )
        self._next_id += 1
        self._transfers[transfer.id] = InFlight(transfer, pages, context)
        self.outbox.append(transfer)
        return transfer

    def take(self) -> list[Transfer]:
        """Everything to be handed to the lanes now."""
        out = self.outbox
        self.sent()
        return out

    def sent(self) -> None:
        """Note that the lanes have what is in the outbox, and know what is promoted."""
        if self.outbox:
            self._last_sent = self.outbox[-1].id
            self.outbox = []
        self.promoted = []

    def rebuild(self) -> None:
        """Make outgoing what is booked and not with the lanes: an exception may have come between the two."""
        self._next_id = max(self._next_id, max(self._transfers, default=0) + 1)
        self.outbox = [
            flight.transfer for number, flight in sorted(self._transfers.items()) if number > self._last_sent
        ]
        self.stalled &= self._transfers.keys()

    def land(self, transfer_id: int) -> InFlight | None:
        """The flight of an outcome, which is then over; None for an unknown or a second outcome."""
        self.stalled.discard(transfer_id)
        return self._transfers.pop(transfer_id, None)

    def stall(self, tier: str) -> None:
        """The tier went down: nobody should wait for what is under way there."""
        self.stalled.update(i for i, flight in self._transfers.items() if flight.transfer.tier == tier)
        self._has_new_stalled = True

    def take_stalled(self) -> list[InFlight]:
        """The pages of that which are still under way, once after each `stall`."""
        if not self._has_new_stalled:
            return []
        self._has_new_stalled = False
        return [self._transfers[i] for i in self.stalled]

    def get(self, transfer_id: int) -> InFlight | None:
        """A transfer that is under way."""
        return self._transfers.get(transfer_id)

    def under_way(self) -> list[InFlight]:
        return list(self._transfers.values())

    def __len__(self) -> int:
        return len(self._transfers)
