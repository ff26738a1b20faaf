"""Pages of a daemon on another machine: they pass through slots of this process's own.

Where client and daemon share memory, a lease's slots are the daemon's. Where they do not, each page of a lease gets a
slot here: a load fills it from the connection before it counts as ready, a save is sent from it when it completes.
Bytes are received straight into slots and sent straight from them, with a checksum beside each page.

Any thread; one lease is carried by one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import xxhash

from kvstore.errors import RequestError
from kvstore.layout import Layout
from kvstore.plan.records import SlotPage
from kvstore.plan.slots import SlotPool
from kvstore.service import messages, protocol
from kvstore.service.protocol import HEADER, PAGE_HEAD, Op, ProtocolError, Status
from kvstore.service.wire import Wire
from kvstore.tiers.host import HostSlab

MAX_BATCH_PAGES = 64  # asked for at once, so that a connection is not bound for the whole of a long prompt


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
        wire.begin(timeout_s)
        at = 0
        while at < len(wanted):
            first = wanted[at]
            count = 1
            while at + count < len(wanted) and count < MAX_BATCH_PAGES and wanted[at + count] == first + count:
                count += 1
            wire.send(Op.READ, messages.encode_read(lease_id, first, count))
            # Every frame is received, also after a bad one: the connection is used again.
            if not all([self._receive_page(wire, pages[index], index) for index in range(first, first + count)]):
                return False
            at += count
        return True

    def send(
        self, wire: Wire, lease_id: int, pages: Sequence[SlotPage], filled: Sequence[bool], timeout_s: float
    ) -> None:
        """Send the filled pages; they count once the lease is completed on the same connection."""
        wire.begin(timeout_s)
        for index, (page, is_whole) in enumerate(zip(pages, filled, strict=True)):
            if is_whole:
                view = self._view(page)
                head = PAGE_HEAD.pack(lease_id, index, len(view), xxhash.xxh3_64_intdigest(view))
                wire.send_page(head, view)

    def _receive_page(self, wire: Wire, page: SlotPage, index: int) -> bool:
        raw = wire.take(HEADER.size)
        frame = protocol.decode_header(raw)
        if frame.status is Status.ERROR and frame.num_bytes <= protocol.MAX_BODY_BYTES:
            raise RequestError(str(protocol.decode_json(wire.take(frame.num_bytes)).get("message")))
        if frame.op is not Op.READ or frame.status is not Status.OK:
            raise ProtocolError(f"asked for pages, answered {frame.op.name} {frame.status.name}")
        _, answered, size, checksum = PAGE_HEAD.unpack(wire.take(PAGE_HEAD.size))
        view = self._view(page)
        if answered != index or size not in (0, len(view)) or frame.num_bytes != PAGE_HEAD.size + size:
            raise ProtocolError(f"page {index} is asked for, page {answered} of {size} bytes came")
        if size == 0:
            return False
        wire.take_into(view)
        return bool(xxhash.xxh3_64_intdigest(view) == checksum)

    def _view(self, page: SlotPage) -> memoryview:
        return self.slab.view(page.slot)[: self._layout.stored_bytes(page.group)]
