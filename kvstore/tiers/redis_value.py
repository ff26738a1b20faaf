"""What one page looks like in Redis, and how a reader judges what came back.

    prefix | page key (36 bytes)                          the head: header (128) | tokens if any | body's first bytes
    prefix | page key | part number (1 byte, from 1 on)   the bytes that follow, cut by the rule of `redis_parts`

In a cluster `{first 8 bytes of the page key in hex}` stands between prefix and page key: all parts of a page have to
lie on one node, and raw key bytes may themselves contain braces.

The header keeps the deadline the page was written with, which tells pages with a deadline of their own from those
that live by the tier's TTL. It is not compared with a clock: `touch` may have moved the deadline since, and the server,
whose TTL is what counts, does not hand out a page that is past it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import Enum

from kvstore.errors import CorruptPage
from kvstore.page import HEADER_BYTES, PageHeader, PageKey, PageMeta, decode_header, verify_page
from kvstore.tiers.redis_parts import part_sizes
from kvstore.tiers.redis_wire import command

TOKEN_BYTES_FIELD = struct.Struct("<6xH")  # the header's token count, needed before the header can be verified
EXPIRES_FIELD = (96, 103)  # first and last byte of the header's expires_at, as GETRANGE wants them


class KeyNames:
    """Names the Redis keys of a page. `tagged` puts all parts of a page on one node of a cluster."""

    def __init__(self, prefix: bytes, *, tagged: bool) -> None:
        self._prefix = prefix
        self._tagged = tagged

    def head(self, key: PageKey) -> bytes:
        """The key whose presence means the page is there."""
        tag = b"{%s}" % key[:8].hex().encode() if self._tagged else b""
        return self._prefix + tag + key

    def parts(self, key: PageKey, count: int) -> list[bytes]:
        """The keys of all parts of a page, head first."""
        head = self.head(key)
        return [head, *(head + bytes([number]) for number in range(1, count))]


class PageSink:
    """Takes a page as it arrives: header and tokens aside, the body into the slot."""

    def __init__(self, slot: memoryview) -> None:
        self.header = bytearray(HEADER_BYTES)
        self.tokens: bytearray | None = None  # made when the header, which says how many, is complete
        self.slot = slot
        self._views = [memoryview(self.header)]
        self._done = 0

    def window(self, num_bytes: int) -> memoryview:
        """The next place, at most `num_bytes` long; empty once the slot is full."""
        while self._views and self._done == len(self._views[0]):
            del self._views[0]
            self._done = 0
            if self.tokens is None:
                self.tokens = bytearray(TOKEN_BYTES_FIELD.unpack_from(self.header)[0])
                self._views = [memoryview(self.tokens), self.slot]
        return self._views[0][self._done : self._done + num_bytes] if self._views else memoryview(b"")

    def advance(self, num_bytes: int) -> None:
        """That many bytes have been put there."""
        self._done += num_bytes

    @property
    def seen(self) -> bytes:
        """The head's first bytes, as far as there were any: they tell whether the page has changed since."""
        return bytes(self.header if self.tokens is not None or not self._views else self.header[: self._done])

    def sizes(self) -> list[int]:
        """The parts the header announces. Raises CorruptPage if there is no readable header."""
        header = decode_header(self.seen)
        return part_sizes(HEADER_BYTES + header.token_bytes + header.stored_bytes)


class Verdict(Enum):
    """What a read found."""

    GOOD = "good"
    GONE = "gone"  # never there, expired or evicted
    TORN = "torn"  # some parts were evicted: what is left is of no use
    CORRUPT = "corrupt"
    OTHER = "other"  # a whole page, but of another length or codec than asked for
    COLLISION = "collision"  # a whole page of other tokens under the same hash


def judge(key: PageKey, meta: PageMeta, sink: PageSink, lengths: Sequence[int | None]) -> Verdict:
    """Compare what arrived (`lengths` of the parts asked for, bytes in `sink`) with what was asked for."""
    if all(length is None for length in lengths):
        return Verdict.GONE
    if lengths[0] is None:
        return Verdict.TORN
    try:
        header = decode_header(sink.seen)
        sizes = sink.sizes()
    except CorruptPage:
        return Verdict.CORRUPT
    found = list(lengths) + [None] * (len(sizes) - len(lengths))
    if any(length is None for length in found[: len(sizes)]):
        return Verdict.TORN if _fits(found, sizes) else Verdict.CORRUPT
    if not _fits(found, sizes) or any(length is not None for length in found[len(sizes) :]):
        return Verdict.CORRUPT
    return _judge_whole(key, meta, sink, header)


def set_page(
    names: Sequence[bytes], sizes: Sequence[int], pieces: Sequence[bytes | memoryview], ttl_ms: int
) -> tuple[list[bytes | memoryview], int]:
    """Encode the commands that store a page; return the buffers to send, uncopied, and the number of replies.

    names, sizes: keys and lengths of the parts; pieces: header, tokens and body, which are laid end to end.

    One part is one SET that leaves a page that is there alone (NX). Several parts are one transaction, so that readers
    see all or none; there the last of two writers at the same moment wins, whole.
    """
    if len(names) == 1:
        buffers = _set(names[0], sizes[0], _cut(pieces, sizes)[0], [b"PX", b"%d" % ttl_ms, b"NX"])
        return buffers, 1
    buffers = [command(b"MULTI")]
    for name, size, part in zip(names, sizes, _cut(pieces, sizes), strict=True):
        buffers += _set(name, size, part, [b"PX", b"%d" % ttl_ms])
    return [*buffers, command(b"EXEC")], len(names) + 2


def _fits(found: Sequence[int | None], sizes: Sequence[int]) -> bool:
    return all(length is None or length == size for length, size in zip(found, sizes, strict=False))


def _judge_whole(key: PageKey, meta: PageMeta, sink: PageSink, header: PageHeader) -> Verdict:
    if header.key != key or header.stored_bytes > len(sink.slot):
        return Verdict.CORRUPT
    tokens = bytes(sink.tokens or b"")
    if not verify_page(sink.seen, header, tokens, sink.slot[: header.stored_bytes]):
        return Verdict.CORRUPT
    if header.codec != 0 or header.stored_bytes != header.raw_bytes or header.raw_bytes != meta.num_bytes:
        return Verdict.OTHER
    if meta.tokens and tokens != meta.tokens:
        return Verdict.COLLISION
    return Verdict.GOOD


def _cut(pieces: Sequence[bytes | memoryview], sizes: Sequence[int]) -> list[list[memoryview]]:
    """Cut the concatenation of `pieces` into runs of `sizes` bytes, copying nothing."""
    views = [memoryview(piece) for piece in pieces if len(piece)]
    parts: list[list[memoryview]] = []
    for size in sizes:
        part: list[memoryview] = []
        while size:
            part.append(views[0][:size])
            views[0] = views[0][size:]
            size -= len(part[-1])
            if not views[0]:
                del views[0]
        parts.append(part)
    return parts


def _set(name: bytes, size: int, part: Sequence[memoryview], options: Sequence[bytes]) -> list[bytes | memoryview]:
    start = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (3 + len(options), len(name), name, size)
    end = b"\r\n" + b"".join([b"$%d\r\n%s\r\n" % (len(option), option) for option in options])
    return [start, *part, end]
