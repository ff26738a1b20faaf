"""The index record of one page: the page header, where the bytes lie, and until when they live.

    offset  bytes
    0       128     page header, as in kvstore/page.py; its key is the index key
    128     8       stamp u64 LE: position in the order of use
    136     8       expires f64 LE: Unix time after which the page is not served; 0 never. A touch moves it, so the
    header's does
                    not count
    144     4       slot u32 LE
    148     4       zero
    152     n       tokens; n stands in the header
    152+n   8       xxh3_64 LE of everything before

Its own checksum is needed because the index decides which slot is read and until when: the page's checksum does not see
that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from kvstore.errors import CorruptPage
from kvstore.page import HEADER_BYTES, KEY_BYTES, KEY_OFFSET, PageHeader, PageKey, PageMeta, decode_header, decode_meta

_PLACE = struct.Struct("<QdII")
_CHECKSUM = struct.Struct("<Q")
_TOKENS_OFFSET = HEADER_BYTES + _PLACE.size
_FIXED_BYTES = _TOKENS_OFFSET + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class PageRecord:
    """One published page. `raw_header` is kept because the page's checksum is computed over its bytes."""

    header: PageHeader
    raw_header: bytes
    slot: int
    stamp: int
    expires_at: float
    tokens: bytes

    def is_expired(self, now: float) -> bool:
        """True if the page must not be served at Unix time `now`."""
        return 0 < self.expires_at <= now

    @property
    def meta(self) -> PageMeta:
        """The metadata stored beside the bytes, with the deadline that counts."""
        header = self.header
        return PageMeta(header.raw_bytes, header.parent, header.depth, self.expires_at, self.tokens)


class ScannedRecord(NamedTuple):
    """The part of a record that a planner books: no copy can be read by it."""

    key: PageKey
    meta: PageMeta
    stamp: int


def encode_record(raw_header: bytes, *, slot: int, stamp: int, expires_at: float, tokens: bytes) -> bytes:
    """Make the index value of a page."""
    body = raw_header + _PLACE.pack(stamp, expires_at, slot, 0) + tokens
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def decode_record(key: bytes, raw: bytes) -> PageRecord:
    """Parse the index value of `key`. Raises CorruptPage for any byte that is not as it was written."""
    if len(raw) < _FIXED_BYTES:
        raise CorruptPage(f"index record is {len(raw)} bytes, less than {_FIXED_BYTES}")
    body_bytes = len(raw) - _CHECKSUM.size
    (checksum,) = _CHECKSUM.unpack_from(raw, body_bytes)
    if xxhash.xxh3_64_intdigest(raw[:body_bytes]) != checksum:
        raise CorruptPage("index record does not fit its checksum")
    raw_header = raw[:HEADER_BYTES]
    header = decode_header(raw_header)
    stamp, expires_at, slot, _ = _PLACE.unpack_from(raw, HEADER_BYTES)
    tokens = raw[HEADER_BYTES + _PLACE.size : body_bytes]
    if header.key != key or header.token_bytes != len(tokens):
        raise CorruptPage("index record belongs to another key or has tokens of another length")
    return PageRecord(header, raw_header, slot, stamp, expires_at, tokens)


def decode_scanned(key: bytes, raw: bytes) -> ScannedRecord:
    """Parse only what a scan needs, in a quarter of the time. Raises CorruptPage as `decode_record` does."""
    body = raw[: -_CHECKSUM.size]
    if len(raw) < _FIXED_BYTES or xxhash.xxh3_64_intdigest(body) != _CHECKSUM.unpack_from(raw, len(body))[0]:
        raise CorruptPage("index record does not fit its checksum")
    stamp, expires_at, _, _ = _PLACE.unpack_from(raw, HEADER_BYTES)
    meta = decode_meta(raw[:HEADER_BYTES], expires_at, body[_TOKENS_OFFSET:])
    if meta is None or raw[KEY_OFFSET : KEY_OFFSET + KEY_BYTES] != key:
        raise CorruptPage("index record belongs to another key, format or number of tokens")
    return ScannedRecord(PageKey(key), meta, stamp)


def decode_place(key: bytes, raw: bytes) -> tuple[int, int]:
    """Slot and stamp of the index value of `key`, for when nothing else is needed. Raises CorruptPage."""
    body_bytes = len(raw) - _CHECKSUM.size
    if (
        len(raw) < _FIXED_BYTES
        or xxhash.xxh3_64_intdigest(raw[:body_bytes]) != _CHECKSUM.unpack_from(raw, body_bytes)[0]
    ):
        raise CorruptPage("index record does not fit its checksum")
    if raw[KEY_OFFSET : KEY_OFFSET + KEY_BYTES] != key:
        raise CorruptPage("index record belongs to another key")
    stamp, _, slot, _ = _PLACE.unpack_from(raw, HEADER_BYTES)
    return slot, stamp


def encode_checked(body: bytes) -> bytes:
    """Put a checksum before a small value of the index (its geometry, its state)."""
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def decode_checked(raw: bytes) -> bytes:
    """Undo `encode_checked`. Raises CorruptPage."""
    body = raw[_CHECKSUM.size :]
    if len(raw) < _CHECKSUM.size or xxhash.xxh3_64_intdigest(body) != _CHECKSUM.unpack_from(raw)[0]:
        raise CorruptPage("a value of the index does not fit its checksum")
    return body
