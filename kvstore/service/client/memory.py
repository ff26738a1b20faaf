"""Where a client's process has the pages of its leases: in the daemon's own slab, or in slots of its own.

A daemon on this machine shares its slab, so a lease's slots are the daemon's, and nothing has to be brought or sent.
Over a network each page of a lease gets a slot here (see staging.py): a load is received before it counts as ready, a
save is sent when it completes.

Under the client's lock, but for `receive` and `send`, which carry one lease in one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import StoreForked
from kvstore.forks import in_child
from kvstore.plan.records import SlotPage
from kvstore.service.client.attachment import EPOCH_BITS, Attachment
from kvstore.service.client.connection import Wire
from kvstore.service.client.slab import SlabShare
from kvstore.service.client.split_slab import SplitSlab
from kvstore.service.client.staging import Staging
from kvstore.tiers.host import HostSlab, SlabHandle

_IN_SLAB = (1 << EPOCH_BITS) - 1


class Memory(Protocol):
    """Slots of this process."""

    is_shared: bool  # with the daemon: nothing is received or sent

    def enter(self, attachment: Attachment) -> None:
        """There is a new attachment, whose leases follow."""

    def keep(self, attachments: Iterable[Attachment]) -> None:
        """Let go of what belongs to attachments beside these."""

    def place(self, pages: Sequence[SlotPage]) -> tuple[SlotPage, ...] | None:
        """The pages of a lease with their slots here; None if there is no room."""

    def give_back(self, pages: Sequence[SlotPage]) -> None:
        """A lease ended."""

    @property
    def num_free(self) -> int:
        """Slots that `place` can still give; only asked where it gave none."""

    def receive(self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], num_blocks: int, timeout_s: float) -> bool:
        """Bring the pages of blocks before `num_blocks`; False if one did not come whole. Raises as Staging does."""

    def send(
        self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], filled: Sequence[bool], timeout_s: float
    ) -> None:
        """Send the filled pages, before the lease is completed on the same connection."""

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot."""

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same as an array."""

    def buffer(self, current: Attachment | None) -> npt.NDArray[np.uint8] | None:
        """All slots of an attachment in one piece; None if there are none."""

    @property
    def handles(self) -> tuple[SlabHandle | SlabShare, ...]:
        """The slabs in which slots lie, oldest first, for other processes of the engine."""

    def close(self) -> None:
        """Let go of everything. Idempotent."""


class SharedMemory:
    """The daemon's slab, mapped here; and those of daemons before it, as long as leases need them.

    Slot numbers of attachment n begin at n << 32, so that those of two slabs never meet.
    """

    is_shared = True
    num_free = 0

    def __init__(self, socket: str) -> None:
        """socket: path of the daemon's, for other processes of this engine."""
        self._socket = socket
        self._slabs: dict[int, HostSlab | SplitSlab] = {}  # by epoch
        self._shares: dict[int, SlabShare] = {}
        in_child(self, SharedMemory._begin_anew)

    def enter(self, attachment: Attachment) -> None:
        slab = attachment.slab
        if slab is not None:
            epoch = attachment.slot_base >> EPOCH_BITS
            self._slabs[epoch] = slab
            self._shares[epoch] = SlabShare(
                self._socket,
                attachment.session,
                attachment.slot_base,
                slab.num_slots,
                slab.slot_bytes,
                slab.num_staging if isinstance(slab, SplitSlab) else 0,
            )

    def keep(self, attachments: Iterable[Attachment]) -> None:
        for epoch in set(self._slabs) - {attachment.slot_base >> EPOCH_BITS for attachment in attachments}:
            self._slabs.pop(epoch).close()
            del self._shares[epoch]

    def place(self, pages: Sequence[SlotPage]) -> tuple[SlotPage, ...] | None:
        return tuple(pages)

    def give_back(self, pages: Sequence[SlotPage]) -> None:
        pass

    def receive(self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], num_blocks: int, timeout_s: float) -> bool:
        return True

    def send(
        self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], filled: Sequence[bool], timeout_s: float
    ) -> None:
        pass

    def view(self, slot: int) -> memoryview:
        return self._slab_of(slot).view(slot & _IN_SLAB)

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        return self._slab_of(slot).array(slot & _IN_SLAB)

    def buffer(self, current: Attachment | None) -> npt.NDArray[np.uint8] | None:
        return None if current is None or current.slab is None else current.slab.buffer

    @property
    def handles(self) -> tuple[SlabHandle | SlabShare, ...]:
        return tuple(share for _, share in sorted(self._shares.items()))

    def close(self) -> None:
        for slab in self._slabs.values():
            slab.close()

    def _slab_of(self, slot: int) -> HostSlab | SplitSlab:
        try:
            return self._slabs[slot >> EPOCH_BITS]
        except KeyError:
            raise StoreForked(
                f"slot {slot} is in no slab that this process has: its lease ended, or is a parent's"
            ) from None

    def _begin_anew(self) -> None:
        """In a forked child, which is given the slab again when it says hello."""
        self._slabs, self._shares = {}, {}


class StagedMemory:
    """Slots of this process's own, for pages of a daemon that is somewhere else."""

    is_shared = False

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.receive = staging.receive
        self.send = staging.send
        self.place = staging.place
        self._is_closed = False

    def enter(self, attachment: Attachment) -> None:
        pass

    def keep(self, attachments: Iterable[Attachment]) -> None:
        pass

    def give_back(self, pages: Sequence[SlotPage]) -> None:
        if not self._is_closed:
            self.staging.give_back(pages)

    @property
    def num_free(self) -> int:
        return self.staging.num_free

    def view(self, slot: int) -> memoryview:
        return self.staging.slab.view(slot)

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        return self.staging.slab.array(slot)

    def buffer(self, current: Attachment | None) -> npt.NDArray[np.uint8] | None:
        return self.staging.slab.buffer

    @property
    def handles(self) -> tuple[SlabHandle | SlabShare, ...]:
        return (self.staging.slab.handle,)

    def close(self) -> None:
        self._is_closed = True
        self.staging.slab.close()
