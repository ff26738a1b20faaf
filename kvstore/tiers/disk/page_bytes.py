"""The bytes of pages between slots of host memory and slots of the slab file: encoded, moved, verified, decoded.

A page that is stored as it is moves between the two without a copy; one that is encoded goes through a room of its
thread's own. Any thread.
"""

from __future__ import annotations

import mmap
import threading
from enum import Enum

from kvstore.codecs.coder import PageCoder, UnreadablePage
from kvstore.codecs.exact import ExactCodec
from kvstore.errors import CorruptPage
from kvstore.layout import SLOT_ALIGNMENT
from kvstore.page import PageKey, PageMeta, verify_page
from kvstore.tiers.disk.directory import DiskDirectory
from kvstore.tiers.disk.record import PageRecord


class ReadResult(Enum):
    """The result of reading the bytes of one record."""

    WHOLE = "whole"
    TORN = "torn"  # the bytes are not the page's
    SHORT = "short"  # the file ends before
    FAILED = "failed"  # the disk did not give them
    UNREADABLE = "unreadable"  # a whole page in a codec that this process does not have


class PageBytes:
    """Reads and encodes the pages of one directory."""

    def __init__(self, directory: DiskDirectory, coder: PageCoder) -> None:
        self.coder = coder
        self._directory = directory
        self._slot_bytes = directory.geometry.slot_bytes
        self._scratch = threading.local()  # room for one encoded page, where a thread has met one

    def read(self, record: PageRecord, view: memoryview, errors: list[OSError]) -> ReadResult:
        """Fill the head of a slot with the verified page of a record; an OSError joins `errors`."""
        header, num_bytes = record.header, record.header.stored_bytes
        is_coded = header.codec != ExactCodec.id
        if num_bytes > self._slot_bytes or not (is_coded or num_bytes == header.raw_bytes):
            return ReadResult.TORN
        into = self._room(self._slot_bytes)[: self._slot_bytes] if is_coded else view
        try:
            if not self._directory.slab.read(record.slot, into, num_bytes):
                return ReadResult.SHORT
        except OSError as error:
            errors.append(error)
            return ReadResult.FAILED
        if not verify_page(record.raw_header, header, record.tokens, into[:num_bytes]):
            return ReadResult.TORN
        if is_coded:
            try:
                self.coder.decode(header.key, header.codec, into[:num_bytes], view[: header.raw_bytes])
            except UnreadablePage:
                return ReadResult.UNREADABLE
            except CorruptPage:
                return ReadResult.TORN
        return ReadResult.WHOLE

    def encoded(self, key: PageKey, meta: PageMeta, view: memoryview) -> tuple[memoryview, int, int]:
        """What to write of a page: memory aligned as a slot is, how many bytes of it, and the codec's id."""
        if self.coder.stores_as_is:
            return view, meta.num_bytes, ExactCodec.id
        room = self._room(len(view) + SLOT_ALIGNMENT)
        stored, codec_id = self.coder.encode(key, meta, view[: meta.num_bytes], room)
        return (view if codec_id == ExactCodec.id else room), stored.nbytes, codec_id

    def _room(self, num_bytes: int) -> memoryview:
        """This thread's room for an encoded page, aligned as a slot is."""
        room: memoryview | None = getattr(self._scratch, "room", None)
        if room is None or len(room) < num_bytes:
            size = -(-num_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
            room = self._scratch.room = memoryview(mmap.mmap(-1, size))
        return room
