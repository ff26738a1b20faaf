"""Batches: pages of one lease that travel in one frame, between a daemon and a client on another machine.

    lease id u64 | n u32 | n times: index in the lease u32, bytes u32 | the bytes of the pages | n times: xxh3_64 u64

All numbers are little endian. A page that the daemon has not loaded has 0 bytes. Checksums come last, so the other side
receives the first page while the second is summed up.

The hard thing: a lease may end in another way while its pages are under way, and then its slots are somebody else's. So
the daemon looks the lease up again for every piece: what comes then goes nowhere, what goes out has a wrong checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import xxhash

from kvstore.service.protocol.frames import ProtocolError

MAX_PAGES = 1024
MAX_BYTES = 256 << 20  # of pages, if there are several: a connection is not bound for the whole of a long prompt
SCRAP_BYTES = 64 << 10
LOW_WATER_BYTES = 512 << 10  # of what is still to come: to be woken for less costs the receiver a fifth more

_HEAD = struct.Struct("<QI")
_PAGE = struct.Struct("<II")
SHORTEST = _HEAD.size  # bytes from which the length of the head is known
CHECKSUM_BYTES = 8


def checksum(page: memoryview) -> int:
    """What is sent behind a page."""
    return xxhash.xxh3_64_intdigest(page)


def cut(sizes: Sequence[int]) -> Iterator[slice]:
    """Cut pages of those sizes into batches."""
    start = num_bytes = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == MAX_PAGES or num_bytes + size > MAX_BYTES):
            yield slice(start, index)
            start, num_bytes = index, 0
        num_bytes += size
    if sizes:
        yield slice(start, len(sizes))


def body_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a whole batch."""
    return head_bytes(len(sizes)) + sum(sizes) + CHECKSUM_BYTES * len(sizes)


def parts(
    lease_id: int, indices: Sequence[int], pages: Sequence[memoryview], is_held: Callable[[], bool] = lambda: True
) -> Iterator[bytes | memoryview]:
    """A batch, piece by piece, to be sent one after the other; pages are not copied.

    is_held: asked before each page; with False, the checksum that follows is none.
    """
    entries = b"".join([_PAGE.pack(index, len(page)) for index, page in zip(indices, pages, strict=True)])
    yield _HEAD.pack(lease_id, len(pages)) + entries
    checksums = []
    for page in pages:
        checksums.append(checksum(page) if is_held() else 0)
        if len(page):
            yield page
    yield struct.pack(f"<{len(checksums)}Q", *checksums)


def head_bytes(num_pages: int) -> int:
    """Bytes before the first page."""
    return _HEAD.size + num_pages * _PAGE.size


def count_pages(head: bytes | memoryview) -> int:
    """The number of pages, from the first SHORTEST bytes. Raises ProtocolError."""
    _, num_pages = _HEAD.unpack_from(head)
    if not 0 < num_pages <= MAX_PAGES:
        raise ProtocolError(f"a batch of {num_pages} pages; it may have 1 to {MAX_PAGES}")
    return int(num_pages)


def decode_head(head: bytes | memoryview, num_bytes: int) -> tuple[int, list[int], list[int]]:
    """Lease id, indices and sizes. num_bytes: of the frame's body. Raises ProtocolError if it is another."""
    lease_id, _ = _HEAD.unpack_from(head)
    pages = list(_PAGE.iter_unpack(head[_HEAD.size : head_bytes(count_pages(head))]))
    sizes = [size for _, size in pages]
    if num_bytes != body_bytes(sizes):
        raise ProtocolError(f"a batch of {num_bytes} bytes announces {body_bytes(sizes)}")
    return lease_id, [index for index, _ in pages], sizes


def decode_checksums(raw: bytes | memoryview) -> tuple[int, ...]:
    """The end of a batch."""
    return struct.unpack(f"<{len(raw) // CHECKSUM_BYTES}Q", raw)


class Writable(Protocol):
    """What receives the pages of save leases: a session."""

    def writable(self, lease_id: int, index: int, num_bytes: int) -> memoryview | None:
        """Where a page goes; None if the lease has ended. Raises ProtocolError for a page it never had."""

    def written(self, lease_id: int, index: int) -> None:
        """The page is there, with the bytes that were sent."""


class Incoming:
    """A batch between a socket and the slots of a save lease, of which pieces come. The daemon's event loop only."""

    def __init__(self, session: Writable, head: bytes | memoryview, num_bytes: int) -> None:
        """Raises ProtocolError if the lease has not such pages."""
        self._session = session
        self._lease_id, self._indices, self._sizes = decode_head(head, num_bytes)
        for index, size in zip(self._indices, self._sizes, strict=True):
            if not size:
                raise ProtocolError(f"page {index} is sent with no bytes")
            session.writable(self._lease_id, index, size)
        self._checksums: list[int | None] = []
        self._at = 0  # in the page that is coming
        self._pages_left = sum(self._sizes)

    @property
    def is_full(self) -> bool:
        """True once all pages have come; their checksums follow."""
        return not self._pages_left

    @property
    def tail_bytes(self) -> int:
        """Bytes of the checksums."""
        return CHECKSUM_BYTES * len(self._sizes)

    @property
    def num_coming(self) -> int:
        """Bytes that are still to come."""
        return self._pages_left + self.tail_bytes

    def room(self) -> memoryview:
        """Where the next bytes go; not empty unless the batch is full."""
        current = len(self._checksums)
        size = self._sizes[current]
        view = self._session.writable(self._lease_id, self._indices[current], size)
        if view is None:
            return memoryview(bytearray(min(SCRAP_BYTES, size - self._at)))
        return view[self._at :]

    def advance(self, num_bytes: int) -> None:
        """So many bytes are in their room."""
        current = len(self._checksums)
        size = self._sizes[current]
        self._at += num_bytes
        self._pages_left -= num_bytes
        if self._at == size:
            view = self._session.writable(self._lease_id, self._indices[current], size)
            self._checksums.append(None if view is None else checksum(view))
            self._at = 0

    def take(self, data: memoryview) -> int:
        """Bytes that were received elsewhere; returns how many of them are of pages."""
        taken = 0
        while taken < len(data) and not self.is_full:
            room = self.room()[: len(data) - taken]
            np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(data[taken : taken + len(room)], np.uint8))
            self.advance(len(room))
            taken += len(room)
        return taken

    def end(self, tail: bytes | memoryview) -> None:
        """The checksums have come: pages that have them count."""
        for index, here, there in zip(self._indices, self._checksums, decode_checksums(tail), strict=True):
            if here == there:
                self._session.written(self._lease_id, index)
