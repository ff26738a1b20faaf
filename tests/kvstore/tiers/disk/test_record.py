from __future__ import annotations

import pytest

from kvstore.errors import CorruptPage
from kvstore.page import PageMeta, encode_header, page_key
from kvstore.tiers.disk.record import PageRecord, ScannedRecord, decode_record, decode_scanned, encode_record

KEY = page_key(bytes(range(32)), 3, 1)


def record(
    tokens: bytes = b"", parent: bytes = bytes(range(100, 132)), depth: int = 7, expires_at: float = 5.5
) -> bytes:
    header = encode_header(KEY, PageMeta(4096, parent, depth, 1.0, tokens), memoryview(b"x"), created_at=0.0)
    return encode_record(header, slot=12, stamp=99, expires_at=expires_at, tokens=tokens)


@pytest.mark.parametrize("raw", [record(), record(b"tokens"), record(parent=b"", depth=0), record(expires_at=0.0)])
def test_a_scan_reads_of_a_record_what_is_in_it(raw: bytes) -> None:
    whole = decode_record(KEY, raw)

    assert decode_scanned(KEY, raw) == (KEY, whole.meta, whole.stamp)


def read(decode: object, key: bytes, raw: bytes) -> PageRecord | ScannedRecord | None:
    try:
        return decode(key, raw)  # type: ignore[operator, no-any-return]
    except CorruptPage:
        return None


def test_a_scan_refuses_each_byte_that_is_not_as_it_was_written() -> None:
    raw = record(b"tokens")
    for position in range(len(raw)):
        bad = bytearray(raw)
        bad[position] ^= 0x10
        assert read(decode_scanned, KEY, bytes(bad)) is read(decode_record, KEY, bytes(bad)) is None


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, 159])
def test_a_scan_refuses_what_is_too_short(num_bytes: int) -> None:
    assert read(decode_scanned, KEY, record()[:num_bytes]) is None


def test_a_scan_refuses_the_record_of_another_key() -> None:
    assert read(decode_scanned, page_key(bytes(32)), record()) is None


@pytest.mark.parametrize("position", [0, 4, 6, 120, 127])
def test_a_scan_refuses_a_header_that_is_none_though_its_checksum_fits(position: int) -> None:
    raw = bytearray(record()[:128])
    raw[position] ^= 1  # magic, version, number of tokens, padding
    bad = encode_record(bytes(raw), slot=12, stamp=99, expires_at=0.0, tokens=b"")

    assert read(decode_scanned, KEY, bad) is read(decode_record, KEY, bad) is None
