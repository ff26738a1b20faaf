"""The part of a daemon client's face that concerns bytes: slots of the daemon's slab, mapped into this process."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.service.client.leases import Leases
from kvstore.service.client.link import DaemonLink
from kvstore.service.client.memory import SharedMemory
from kvstore.service.client.slab import SlabShare


class ClientSlots:
    """The `Slots` (see base.py) of a RemoteStore. Any thread."""

    def __init__(self, link: DaemonLink, memory: SharedMemory, leases: Leases) -> None:
        self._link = link
        self._memory = memory
        self._leases = leases

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        return self._memory.view(slot)

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot as an array."""
        return self._memory.array(slot)

    @property
    def slabs(self) -> tuple[SlabShare, ...]:
        """The slabs that slots may lie in, oldest first: the daemon's, and those of daemons before it with leases.

        Whoever maps them in another process maps no others: memory of a daemon that died stays taken until all let go.
        """
        return self._leases.slabs

    @property
    def buffer(self) -> npt.NDArray[np.uint8] | None:
        """The whole slab, for a device to page-lock; None while there is no daemon."""
        attachment = self._link.attachment
        return None if attachment is None else attachment.slab.buffer
