"""The memory that a daemon's client maps: the slab, or the slab to read and staging to write (`service.isolate`)."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from kvstore.service.protocol.frames import ProtocolError
from kvstore.service.protocol.messages import STAGING
from kvstore.tiers.host import HostSlab, SlabHandle


class SplitSlab:
    """The two memories of an isolated client, as one: slots of the daemon's slab, read-only, and of its own staging."""

    def __init__(self, pages: HostSlab, staging: HostSlab) -> None:
        self.num_slots = pages.num_slots
        self.slot_bytes = pages.slot_bytes
        self.num_staging = staging.num_slots
        self.buffer = pages.buffer
        self._pages = pages
        self._staging = staging

    def view(self, slot: int) -> memoryview:
        """The bytes of a slot."""
        return self._pages.view(slot) if slot < STAGING else self._staging.view(slot - STAGING)

    def array(self, slot: int) -> npt.NDArray[np.uint8]:
        """The same as an array."""
        return self._pages.array(slot) if slot < STAGING else self._staging.array(slot - STAGING)

    def close(self) -> None:
        """Unmap both. Idempotent."""
        self.buffer = np.empty(0, np.uint8)
        self._pages.close()
        self._staging.close()


def map_slab(fds: list[int], num_slots: int, slot_bytes: int, num_staging: int) -> HostSlab | SplitSlab:
    """Map what a daemon sent: its slab, and with it a client's staging if that is not to write to the slab.

    fds: emptied; what is not mapped is closed. Raises OSError, ConfigError, or ProtocolError if it sent something else.
    """
    try:
        if len(fds) != (2 if num_staging else 1):
            raise ProtocolError(f"the daemon sent {len(fds)} descriptors")
        size = SlabHandle("the daemon's slab", num_slots, slot_bytes)
        if not num_staging:
            return HostSlab.attach_descriptor(fds.pop(0), size)
        pages = HostSlab.attach_descriptor(fds.pop(0), size, is_read_only=True)
        try:
            own = SlabHandle("the daemon's staging", num_staging, slot_bytes)
            return SplitSlab(pages, HostSlab.attach_descriptor(fds.pop(0), own, prefault=False))
        except BaseException:
            pages.close()
            raise
    finally:
        while fds:
            os.close(fds.pop())
