"""The memory of the pages of a client's leases: the daemon's slab, mapped. Under the client's lock."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore.errors import StoreForked
from kvstore.forks import in_child
from kvstore.service.client.attachment import EPOCH_BITS, Attachment
from kvstore.service.client.slab import SlabShare
from kvstore.service.client.split_slab import SplitSlab
from kvstore.tiers.host import HostSlab

_IN_SLAB = (1 << EPOCH_BITS) - 1


class SharedMemory:
    """The daemon's slab, mapped here; and those of daemons before it, as long as leases need them.

    Slot numbers of attachment n begin at n << 32, so that those of two slabs never meet.
    """

    def __init__(self, socket: str) -> None:
        """socket: path of the daemon's, for other processes of this engine."""
        self._socket = socket
        self._slabs: dict[int, HostSlab | SplitSlab] = {}  # by epoch
        self._shares: dict[int, SlabShare] = {}
        in_child(self, SharedMemory._begin_anew)

    def enter(self, attachment: Attachment) -> None:
        """There is a new attachment, whose leases follow."""
        slab, epoch = attachment.slab, attachment.slot_base >> EPOCH_BITS
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
        """Free the memory of all attachments but these."""
        for epoch in set(self._slabs) - {attachment.slot_base >> EPOCH_BITS for attachment in attachments}:
            self._slabs.pop(epoch).close()
            del self._shares[epoch]

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        return self._slab_of(slot).view(slot & _IN_SLAB)

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same as an array."""
        return self._slab_of(slot).array(slot & _IN_SLAB)

    @property
    def handles(self) -> tuple[SlabShare, ...]:
        """The slabs in which slots lie, oldest first, for other processes of the engine."""
        return tuple(share for _, share in sorted(self._shares.items()))

    def close(self) -> None:
        """Free everything. Idempotent."""
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
