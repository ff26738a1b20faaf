"""Pages of a daemon on another machine: they pass through slots of this process's own.

Where client and daemon share memory, a lease's slots are the daemon's. Where they do not, each page of a lease gets a
slot here: a load fills it from the connection before it counts as ready, a save is sent from it when it completes.
Bytes are received straight into slots and sent straight from them, with a checksum beside each page.

Any thread; one lease is carried by one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstore.errors import RequestError
from kvstore.layout import Layout
from kvstore.plan.records import SlotPage
from kvstore.plan.slots import SlotPool
from kvstore.service.client.connection import Wire
from kvstore.service.protocol import batches, frames, messages
from kvstore.service.protocol.frames import HEADER, Op, ProtocolError, Status
from kvstore.tiers.host import HostSlab


class Staging:
    """Slots of this process for pages of a remote daemon. Any thread."""

    def __init__(self, layout: Layout, num_bytes: int) -> None:
        """Raises ConfigError if not even one page fits."""
        self.slab = HostSlab(num_bytes // layout.slot_bytes, layout.slot_bytes, shared_name="kvstore-staging")
        self._layout = layout
        self._pool = SlotPool(self.slab.num_slots)
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Slots that no lease has."""
        return self._pool.num_free

    def place(self, pages: Sequence[SlotPage]) -> tuple[SlotPage, ...] | None:
        """The pages in slots of this process; None if there are not enough."""
        with self._lock:
            if self._pool.num_free < len(pages):
                return None
            slots = self._pool.take(len(pages))
        return tuple([SlotPage(page.block, page.group, slot) for page, slot in zip(pages, slots, strict=True)])

    def give_back(self, pages: Sequence[SlotPage]) -> None:
        """A lease ended."""
        with self._lock:
            self._pool.give(page.slot for page in pages)

    def receive(self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], num_blocks: int, timeout_s: float) -> bool:
        """Bring the pages of blocks before `num_blocks` into their slots; False if one of them did not come whole.

        Raises RequestError if the lease has ended over there: it was held for too long.
        """
        wanted = [index for index, page in enumerate(pages) if page.block < num_blocks]
        views = [self._view(pages[index]) for index in wanted]
        wire.begin(timeout_s)
        for batch in batches.cut([len(view) for view in views]):
            if not self._receive_batch(wire, lease_id, wanted[batch], views[batch]):
                return False
        return True

    def send(
        self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], filled: Sequence[bool], timeout_s: float
    ) -> None:
        """Send the filled pages; they count once the lease is completed on the same connection."""
        indices = [index for index, is_whole in enumerate(filled) if is_whole]
        views = [self._view(pages[index]) for index in indices]
        sizes = [len(view) for view in views]
        wire.begin(timeout_s)
        for batch in batches.cut(sizes):
            parts = batches.parts(lease_id, indices[batch], views[batch])
            wire.send(Op.WRITE, batches.body_bytes(sizes[batch]), parts)

    def _receive_batch(self, wire: Wire, lease_id: int, indices: Sequence[int], views: Sequence[memoryview]) -> bool:
        request = messages.encode_read(lease_id, indices)
        wire.send(Op.READ, len(request), [request])
        frame = frames.decode_header(wire.take(HEADER.size))
        if frame.status is Status.ERROR and frame.num_bytes <= frames.MAX_BODY_BYTES:
            raise RequestError(str(frames.decode_json(wire.take(frame.num_bytes)).get("message")))
        if frame.op is not Op.READ or frame.status is not Status.OK:
            raise ProtocolError(f"asked for pages, answered {frame.op.name} {frame.status.name}")
        _, answered, sizes = batches.decode_head(wire.take(batches.head_bytes(len(views))), frame.num_bytes)
        if answered != list(indices):
            raise ProtocolError(f"pages {indices} are asked for, pages {answered} came")
        num_following = frame.num_bytes - batches.head_bytes(len(views))
        checksums = []
        # Every page is received, also after one that is missing: the connection is used again.
        for view, size in zip(views, sizes, strict=True):
            if size not in (0, len(view)):
                raise ProtocolError(f"a page of {len(view)} bytes is asked for, {size} bytes came")
            num_following -= size
            wire.take_into(view[:size], num_following)
            checksums.append(batches.checksum(view[:size]))
        told = batches.decode_checksums(wire.take(num_following))
        return all(sizes) and told == tuple(checksums)

    def _view(self, page: SlotPage) -> memoryview:
        return self.slab.view(page.slot)[: self._layout.stored_bytes(page.group)]
