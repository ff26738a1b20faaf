"""Page keys and the page header: written down byte by byte, and no byte may change unnoticed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import CorruptPage, RequestError
from kvstore.page import (
    HEADER_BYTES,
    KEY_BYTES,
    PageMeta,
    decode_header,
    encode_header,
    page_key,
    split_key,
    verify_page,
)

BLOCK = bytes(range(32))
PARENT = bytes(range(100, 132))
PAGE = bytes(random.Random(0).randbytes(1000))


def header_of(page: bytes = PAGE, tokens: bytes = b"", generation: int = 7) -> bytes:
    meta = PageMeta(len(page), PARENT, depth=9, expires_at=2.5, tokens=tokens)
    return encode_header(page_key(BLOCK, 1, 2), meta, memoryview(page), created_at=1.5, generation=generation)


def is_whole(raw: bytes, tokens: bytes, page: bytes) -> bool:
    try:
        return verify_page(raw, decode_header(raw), tokens, memoryview(page))
    except CorruptPage:
        return False


class TestKeys:
    def test_a_key_is_hash_group_and_shard(self) -> None:
        key = page_key(BLOCK, group=0x0102, shard=0x0304)

        assert key == BLOCK + b"\x01\x02\x03\x04"
        assert len(key) == KEY_BYTES == 36
        assert split_key(key) == (BLOCK, 0x0102, 0x0304)

    def test_a_short_hash_is_padded(self) -> None:
        assert split_key(page_key(b"\xff" * 16)) == (b"\xff" * 16 + bytes(16), 0, 0)

    def test_a_hash_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(RequestError, match="33 bytes"):
            page_key(bytes(33))

    @given(st.binary(max_size=32), st.integers(0, 65_535), st.integers(0, 65_535))
    def test_keys_of_one_block_sort_together(self, block: bytes, group: int, shard: int) -> None:
        key = page_key(block, group, shard)

        assert page_key(block) <= key < page_key(block, 65_535, 65_535) + b"\0"
        assert split_key(key) == (block.ljust(32, b"\0"), group, shard)


class TestHeader:
    def test_every_field_comes_back(self) -> None:
        header = decode_header(header_of(tokens=b"\1\0\0\0"))

        assert header.key == page_key(BLOCK, 1, 2)
        assert (header.parent, header.depth) == (PARENT, 9)
        assert (header.codec, header.token_bytes) == (0, 4)
        assert (header.raw_bytes, header.stored_bytes) == (1000, 1000)
        assert (header.created_at, header.expires_at, header.generation) == (1.5, 2.5, 7)

    def test_bytes_are_where_the_format_says(self) -> None:
        # docs/formats.md, "Page header": a change here is a change of the format version.
        raw = header_of(tokens=b"\1\0\0\0")

        assert len(raw) == HEADER_BYTES == 128
        assert raw[0:4] == b"KVPG"
        assert raw[4:8] == b"\x01\x00\x04\x00"  # version 1, codec 0, 4 bytes of tokens
        assert raw[8:44] == BLOCK + b"\x00\x01\x00\x02"
        assert raw[44:76] == PARENT
        assert raw[76:88] == bytes([9, 0, 0, 0, 0xE8, 3, 0, 0, 0xE8, 3, 0, 0])  # depth, raw and stored length
        assert np.frombuffer(raw[88:104], "<f8").tolist() == [1.5, 2.5]  # created, expires
        assert raw[104:112] == bytes([7, 0, 0, 0, 0, 0, 0, 0])  # generation
        assert raw[112:120].hex() == "7621850826819919"
        assert raw[120:128] == bytes(8)

    def test_the_published_example_is_what_is_written(self) -> None:
        text = (Path(__file__).parents[2] / "docs/formats.md").read_text()
        example = text.split("## Page header")[1].split("codec exact:\n\n")[1].split("\n\n")[0]
        page = bytes(range(256))

        meta = PageMeta(len(page), b"\x22" * 32, depth=3, expires_at=2.5)
        raw = encode_header(page_key(b"\x11" * 32, 1, 2), meta, memoryview(page), created_at=1.5, generation=7)

        assert raw == bytes.fromhex(example)
        # The checksum again, from its description alone.
        checksum = xxhash.xxh3_64_intdigest(page, seed=xxhash.xxh3_64_intdigest(raw[:112]))
        assert raw[112:120] == checksum.to_bytes(8, "little")

    def test_the_root_has_no_parent(self) -> None:
        raw = encode_header(page_key(BLOCK), PageMeta(4), memoryview(b"page"), created_at=0.0)

        assert decode_header(raw).parent == b""

    def test_a_codec_tells_both_lengths(self) -> None:
        raw = encode_header(page_key(BLOCK), PageMeta(1000), memoryview(b"short"), created_at=0.0, codec=1)
        header = decode_header(raw)

        assert (header.codec, header.raw_bytes, header.stored_bytes) == (1, 1000, 5)

    @pytest.mark.parametrize(
        ("raw", "told"),
        [
            (b"", "0 bytes"),
            (header_of() + b"\0", "129 bytes"),
            (b"KVPQ" + header_of()[4:], "KVPQ"),
            (b"KVPG\2" + header_of()[5:], "version 2; this release reads 1"),
            (header_of()[:-1] + b"\1", "padding"),
        ],
    )
    def test_what_is_no_header_is_corrupt_and_says_why(self, raw: bytes, told: str) -> None:
        with pytest.raises(CorruptPage, match=told):
            decode_header(raw)

    def test_a_memoryview_is_as_good_as_bytes(self) -> None:
        raw = header_of()

        assert decode_header(memoryview(raw)) == decode_header(raw)
        assert verify_page(memoryview(raw), decode_header(raw), b"", memoryview(PAGE))


class TestChecksum:
    def test_what_was_written_is_whole(self) -> None:
        assert is_whole(header_of(), b"", PAGE)
        assert is_whole(header_of(tokens=b"\1\0\0\0"), b"\1\0\0\0", PAGE)
        assert is_whole(header_of(b""), b"", b"")

    def test_every_flipped_bit_of_header_and_tokens_is_seen(self) -> None:
        tokens = bytes(range(16))
        raw = header_of(tokens=tokens)

        for position in range(8 * HEADER_BYTES):
            damaged = bytearray(raw)
            damaged[position // 8] ^= 1 << position % 8
            assert not is_whole(bytes(damaged), tokens, PAGE), position
        for position in range(8 * len(tokens)):
            damaged = bytearray(tokens)
            damaged[position // 8] ^= 1 << position % 8
            assert not is_whole(raw, bytes(damaged), PAGE), position

    def test_every_flipped_byte_of_the_page_is_seen(self) -> None:
        raw = header_of()

        for position in range(len(PAGE)):
            damaged = bytearray(PAGE)
            damaged[position] ^= 1 << position % 8
            assert not is_whole(raw, b"", bytes(damaged)), position

    def test_a_page_under_another_pages_header_is_seen(self) -> None:
        other = encode_header(page_key(BLOCK, 1, 3), PageMeta(len(PAGE)), memoryview(PAGE), created_at=1.5)
        mixed = other[:112] + header_of()[112:]

        assert not is_whole(mixed, b"", PAGE)
        assert not is_whole(header_of(generation=8)[:112] + header_of(generation=7)[112:], b"", PAGE)

    def test_another_length_is_seen(self) -> None:
        assert not is_whole(header_of(), b"", PAGE[:-1])
        assert not is_whole(header_of(), b"", PAGE + b"\0")
