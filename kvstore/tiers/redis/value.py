"""The form of one page in Redis, and how a reader judges what came back.

    prefix | page key (36 bytes)                          the head: header (128) | tokens if any | body's first bytes
    prefix | page key | part number (1 byte, from 1 on)   the bytes that follow, cut by the rule of `redis_parts`

In a cluster `{first 8 bytes of the page key in hex}` stands between prefix and page key: all parts of a page have to
lie on one node, and raw key bytes may themselves contain braces.

The header keeps the deadline the page was written with. It is not compared with a clock: `touch` may have moved the
deadline since, and the server, whose TTL is what counts, does not hand out a page that is past it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from enum import Enum

from kvstore.codecs.coder import PageCoder, UnreadablePage
from kvstore.codecs.exact import ExactCodec
from kvstore.errors import CorruptPage
from kvstore.page import HEADER_BYTES, PageHeader, PageKey, PageMeta, decode_header, encode_header, verify_page
from kvstore.tiers.redis.connection import command
from kvstore.tiers.redis.parts import part_sizes

# Codec and lengths of tokens and stored bytes, needed before the header can be verified: they say where the rest goes.
PLACING_FIELDS = struct.Struct("<5xBH76xI")


class KeyNames:
    """Names the Redis keys of a page. `tagged` puts all parts of a page on one node of a cluster."""

    def __init__(self, prefix: bytes, *, tagged: bool) -> None:
        self.prefix = prefix
        self._tagged = tagged

    def head(self, key: PageKey) -> bytes:
        """The key whose presence means the page is there."""
        tag = b"{%s}" % key[:8].hex().encode() if self._tagged else b""
        return self.prefix + tag + key

    def beside(self, what: bytes, number: int) -> bytes:
        """A name under the prefix that no page has; in a cluster, each number lies elsewhere."""
        tag = b"{%d}" % number if self._tagged else b""
        return self.prefix + tag + what

    @property
    def pattern(self) -> bytes:
        """Matches every key under the prefix, and no other, in SCAN's language."""
        return re.sub(rb"([\\*?\[\]^-])", rb"\\\1", self.prefix) + b"*"

    @staticmethod
    def parts(head: bytes, count: int) -> list[bytes]:
        """The keys of all parts of a page, head first."""
        return [head, *(head + bytes([number]) for number in range(1, count))]


class PageSink:
    """Takes a page as it arrives: header and tokens aside, the body into the slot, or aside if it has to be decoded."""

    def __init__(self, slot: memoryview) -> None:
        self.header = bytearray(HEADER_BYTES)
        self.tokens: bytearray | None = None  # made when the header is complete
        self.slot = slot
        self.body = slot
        self._views = [memoryview(self.header)]
        self._done = 0

    def window(self, num_bytes: int) -> memoryview:
        """The next place, at most `num_bytes` long; empty once all is full."""
        while self._views and self._done == len(self._views[0]):
            del self._views[0]
            self._done = 0
            if self.tokens is None:
                self._place()
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
        return _sizes(decode_header(self.seen))

    def _place(self) -> None:
        codec, token_bytes, stored_bytes = PLACING_FIELDS.unpack_from(self.header)
        self.tokens = bytearray(token_bytes)
        # The header may be garbled: an encoded page is never longer than a raw one (`encode_page`).
        if codec != ExactCodec.id and stored_bytes <= len(self.slot):
            self.body = memoryview(bytearray(stored_bytes))
        self._views = [memoryview(self.tokens), self.body]


class Verdict(Enum):
    """The result of a read."""

    GOOD = "good"
    GONE = "gone"  # never there, expired or evicted
    TORN = "torn"  # some parts were evicted: what is left is of no use
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"  # a whole page in a codec that this process does not have
    COLLISION = "collision"  # a whole page of other tokens under the same hash


def judge(key: PageKey, meta: PageMeta, sink: PageSink, lengths: Sequence[int | None], coder: PageCoder) -> Verdict:
    """Compare what arrived (`lengths` of the parts asked for, bytes in `sink`) with what was asked for, and decode it.

    After GOOD the slot has the page; after anything else its bytes are undefined.
    """
    if all(length is None for length in lengths):
        return Verdict.GONE
    if lengths[0] is None:
        return Verdict.TORN
    try:
        header = decode_header(sink.seen)
        # Parts beyond these are what is left of an older, longer encoding of the page.
        sizes = sink.sizes()
        found = [*lengths, *([None] * len(sizes))][: len(sizes)]
        if any(length not in (None, size) for length, size in zip(found, sizes, strict=True)):
            return Verdict.CORRUPT
        return Verdict.TORN if None in found else _judge_whole(key, meta, sink, header, coder)
    except CorruptPage:
        return Verdict.CORRUPT


def encode_page(
    key: PageKey, meta: PageMeta, body: memoryview, coder: PageCoder, *, created_at: float
) -> list[bytes | memoryview]:
    """Header, tokens and stored bytes of a page."""
    stored, codec_id = coder.encode(key, meta, body)
    header = encode_header(key, meta, stored, created_at=created_at, codec=codec_id)
    return [header, meta.tokens, stored]


def set_page(
    names: Sequence[bytes], sizes: Sequence[int], pieces: Sequence[bytes | memoryview], ttl_ms: int | None
) -> tuple[list[bytes | memoryview], int]:
    """Encode the commands that store a page; return the buffers to send, uncopied, and the number of replies.

    names, sizes: keys and lengths of the parts; pieces: what `encode_page` made, which is laid end to end.
    ttl_ms:       None for a page that does not expire.

    One part is one SET that leaves a page that is there alone (NX). Several parts are one transaction, so that readers
    see all or none; there the last of two writers at the same moment wins, whole.
    """
    options = [] if ttl_ms is None else [b"PX", b"%d" % ttl_ms]
    if len(names) == 1:
        return _set(names[0], sizes[0], _cut(pieces, sizes)[0], [*options, b"NX"]), 1
    buffers: list[bytes | memoryview] = [command(b"MULTI")]
    for name, size, part in zip(names, sizes, _cut(pieces, sizes), strict=True):
        buffers += _set(name, size, part, options)
    return [*buffers, command(b"EXEC")], len(names) + 2


def _sizes(header: PageHeader) -> list[int]:
    return part_sizes(HEADER_BYTES + header.token_bytes + header.stored_bytes)


def _judge_whole(key: PageKey, meta: PageMeta, sink: PageSink, header: PageHeader, coder: PageCoder) -> Verdict:
    stored = sink.body[: header.stored_bytes]
    tokens = bytes(sink.tokens or b"")
    if header.key != key or header.raw_bytes != meta.num_bytes or stored.nbytes != header.stored_bytes:
        return Verdict.CORRUPT
    if not verify_page(sink.seen, header, tokens, stored):
        return Verdict.CORRUPT
    if meta.tokens and tokens != meta.tokens:
        return Verdict.COLLISION
    if header.codec == ExactCodec.id:
        return Verdict.GOOD if header.stored_bytes == header.raw_bytes else Verdict.CORRUPT
    try:
        coder.decode(key, header.codec, stored, sink.slot[: header.raw_bytes])
    except UnreadablePage:
        return Verdict.UNREADABLE
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
