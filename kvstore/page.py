"""How a page is named and what is written beside it, wherever it leaves host memory.

A page key is 36 bytes: block hash (32, shorter hashes are padded with zeros) | group u16 | shard u16, big endian, so
that the keys of one block sort together. The header is 128 bytes, described byte by byte in docs/formats.md. Its
checksum covers the header's own fields and the page's bytes, so a page in the wrong place, of the wrong length or of
the wrong group fails like a flipped bit does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NewType

import xxhash

from kvstore.errors import CorruptPage, RequestError

PageKey = NewType("PageKey", bytes)

MAGIC = b"KVPG"
FORMAT_VERSION = 1
HASH_BYTES = 32
KEY_BYTES = HASH_BYTES + 4
HEADER_BYTES = 128
KEY_OFFSET = 8  # where the key stands in the header

_SUFFIX = struct.Struct(">HH")
# magic, version, codec, token bytes, key, parent hash, depth, raw length, stored length, created, expires, generation
_FIELDS = struct.Struct("<4sBBH36s32sIIIddQ")
_CHECKSUM = struct.Struct("<Q")
# magic, version, token bytes, parent hash, depth, raw length, padding; the rest is passed over
_META = struct.Struct(f"<4sBxH36x32sII4x8x8x8x8x{HEADER_BYTES - _FIELDS.size - _CHECKSUM.size}s")
_NO_PARENT = bytes(HASH_BYTES)
_PADDING = bytes(HEADER_BYTES - _FIELDS.size - _CHECKSUM.size)


def page_key(block_hash: bytes, group: int = 0, shard: int = 0) -> PageKey:
    """Name the page of `block_hash` in layer group `group` on shard `shard`.

    Raises RequestError for a hash longer than 32 bytes, which would not fit its place in the header.
    """
    if len(block_hash) > HASH_BYTES:
        raise RequestError(f"block hash is {len(block_hash)} bytes; a page key holds at most {HASH_BYTES}")
    return PageKey(block_hash.ljust(HASH_BYTES, b"\0") + _SUFFIX.pack(group, shard))


def split_key(key: PageKey) -> tuple[bytes, int, int]:
    """Return (block hash padded to 32 bytes, group, shard)."""
    group, shard = _SUFFIX.unpack_from(key, HASH_BYTES)
    return key[:HASH_BYTES], group, shard


@dataclass(frozen=True, slots=True)
class PageMeta:
    """The metadata that travels with a page's bytes.

    num_bytes:  bytes of the slot that carry data (the view's head; the rest is padding).
    parent:     hash of the block before this one, b"" at the root; lets a reopened store rebuild its tree.
    depth:      number of blocks before this one.
    expires_at: Unix time in seconds after which the page must not be served; 0 means never.
    tokens:     the block's tokens as little-endian uint32, only in namespaces whose hash is not collision resistant:
                they are stored on a write and compared on a read. b"" otherwise.
    """

    num_bytes: int
    parent: bytes = b""
    depth: int = 0
    expires_at: float = 0.0
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The decoded 128 bytes; `checksum` is what the writer computed.

    parent: b"" at the root, else padded with zeros to 32 bytes, like the hash inside `key`.
    """

    key: PageKey
    parent: bytes
    depth: int
    codec: int
    token_bytes: int
    raw_bytes: int
    stored_bytes: int
    created_at: float
    expires_at: float
    generation: int
    checksum: int


def encode_header(
    key: PageKey,
    meta: PageMeta,
    stored: memoryview,
    *,
    created_at: float,
    generation: int = 0,
    codec: int = 0,
) -> bytes:
    """Make the header of a page whose stored bytes (after the codec) are `stored`."""
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        codec,
        len(meta.tokens),
        key,
        meta.parent,
        meta.depth,
        meta.num_bytes,
        stored.nbytes,
        created_at,
        meta.expires_at,
        generation,
    )
    return fields + _CHECKSUM.pack(_checksum(fields, meta.tokens, stored)) + _PADDING


def decode_header(raw: bytes | memoryview) -> PageHeader:
    """Parse 128 bytes. Raises CorruptPage for anything that is not a header of this version."""
    if len(raw) != HEADER_BYTES:
        raise CorruptPage(f"page header is {len(raw)} bytes, not {HEADER_BYTES}")
    magic, version, codec, token_bytes, key, parent, depth, raw_bytes, stored_bytes, created, expires, generation = (
        _FIELDS.unpack_from(raw)
    )
    if magic != MAGIC:
        raise CorruptPage(f"page header starts with {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise CorruptPage(f"page header has format version {version}; this release reads {FORMAT_VERSION}")
    if bytes(raw[_FIELDS.size + _CHECKSUM.size :]) != _PADDING:
        raise CorruptPage("page header has bytes set in its padding")
    (checksum,) = _CHECKSUM.unpack_from(raw, _FIELDS.size)
    return PageHeader(
        PageKey(key),
        b"" if parent == _NO_PARENT else parent,
        depth,
        codec,
        token_bytes,
        raw_bytes,
        stored_bytes,
        created,
        expires,
        generation,
        checksum,
    )


def decode_meta(raw: bytes, expires_at: float, tokens: bytes) -> PageMeta | None:
    """Read of a header only what `PageMeta` has; None for what `decode_header` refuses, or tokens of another length.

    A store that is opened again reads a million of them, and nothing else of them.
    """
    magic, version, token_bytes, parent, depth, raw_bytes, padding = _META.unpack(raw)
    if magic != MAGIC or version != FORMAT_VERSION or padding != _PADDING or token_bytes != len(tokens):
        return None
    return PageMeta(raw_bytes, b"" if parent == _NO_PARENT else parent, depth, expires_at, tokens)


def verify_page(raw_header: bytes | memoryview, header: PageHeader, tokens: bytes, stored: memoryview) -> bool:
    """True if `stored` and every field of the header are the bytes that were written."""
    return _checksum(raw_header[: _FIELDS.size], tokens, stored) == header.checksum


def _checksum(fields: bytes | memoryview, tokens: bytes, stored: memoryview) -> int:
    # Seeding with the header's own checksum binds key, group, lengths and times to the bytes without copying either.
    seed = xxhash.xxh3_64_intdigest(bytes(fields) + tokens)
    return xxhash.xxh3_64_intdigest(stored, seed=seed)
