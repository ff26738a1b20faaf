from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs.coder import PageCoder
from kvstore.codecs.exact import ExactCodec
from kvstore.codecs.lossless import LosslessCodec
from kvstore.page import HEADER_BYTES, PageMeta, decode_header, encode_header
from kvstore.testing.pages import key_of, payload
from kvstore.tiers.redis.parts import part_sizes
from kvstore.tiers.redis.value import PLACING_FIELDS, KeyNames, PageSink, Verdict, encode_page, judge, set_page

KEY = key_of("page")
META = PageMeta(8192, tokens=b"\1\0\0\0\2\0\0\0", expires_at=12345.5)
BODY = memoryview(payload(KEY, 8192))


def stream(meta: PageMeta = META, body: memoryview = BODY, codec: str = "exact") -> bytes:
    return b"".join(encode_page(KEY, meta, body, PageCoder(codec), created_at=1.0))


def pour(data: bytes, slot_bytes: int = 8192, chunk: int = 1000) -> PageSink:
    """Put `data` into a sink as a socket would, until the sink is full."""
    sink = PageSink(memoryview(bytearray(slot_bytes)))
    while data and len(window := sink.window(min(chunk, len(data)))):
        window[:] = data[: len(window)]
        sink.advance(len(window))
        data = data[len(window) :]
    return sink


def judged(data: bytes, meta: PageMeta = META, lengths: list[int | None] | None = None) -> Verdict:
    return judge(KEY, meta, pour(data), part_sizes(len(data)) if lengths is None else lengths, PageCoder())


def test_a_page_has_one_key_per_part_and_a_cluster_sees_one_tag_in_them() -> None:
    plain, tagged = KeyNames(b"kv", tagged=False), KeyNames(b"kv", tagged=True)

    assert plain.parts(plain.head(KEY), 3) == [b"kv" + KEY, b"kv" + KEY + b"\1", b"kv" + KEY + b"\2"]
    assert tagged.head(KEY) == b"kv{" + KEY[:8].hex().encode() + b"}" + KEY


def test_the_fields_read_before_verification_are_where_the_header_has_them() -> None:
    header = encode_header(KEY, META, BODY, created_at=1.0, codec=7)

    assert PLACING_FIELDS.unpack_from(header) == (7, len(META.tokens), BODY.nbytes)


@given(chunk=st.integers(1, 9000))
def test_a_page_is_put_together_whatever_pieces_it_arrives_in(chunk: int) -> None:
    data = stream()
    sink = pour(data, chunk=chunk)

    assert judge(KEY, META, sink, part_sizes(len(data)), PageCoder()) is Verdict.GOOD
    assert (sink.seen, bytes(sink.tokens or b""), bytes(sink.slot)) == (data[:128], META.tokens, bytes(BODY))


def test_an_encoded_page_is_decoded_into_its_slot() -> None:
    elements = np.random.default_rng(0).normal(size=4096).astype("<f4").view("<u4") >> 16  # bfloat16
    body = memoryview(elements.astype("<u2").tobytes())
    data = stream(body=body, codec="lossless")
    sink = pour(data)

    assert len(data) < HEADER_BYTES + body.nbytes
    assert judge(KEY, META, sink, part_sizes(len(data)), PageCoder()) is Verdict.GOOD
    assert sink.slot == body


def test_what_a_codec_cannot_shrink_is_stored_raw() -> None:
    assert decode_header(stream(codec="lossless")[:HEADER_BYTES]).codec == ExactCodec.id


def test_a_whole_page_in_an_unknown_codec_is_unreadable_not_corrupt() -> None:
    data = encode_header(KEY, META, BODY, created_at=1.0, codec=200) + META.tokens + bytes(BODY)

    assert judged(data) is Verdict.UNREADABLE


def test_absent_parts_are_told_apart() -> None:
    data = stream()
    head, tail = part_sizes(len(data))

    assert judged(b"", lengths=[None, None]) is Verdict.GONE
    assert judged(data[:head], lengths=[head, None]) is Verdict.TORN
    assert judged(data[head:], lengths=[None, tail]) is Verdict.TORN


def test_what_is_left_of_a_longer_encoding_does_no_harm() -> None:
    data = stream()

    assert judged(data + b"old", lengths=[*part_sizes(len(data)), 3]) is Verdict.GOOD


def test_other_tokens_are_a_collision() -> None:
    assert judged(stream(), PageMeta(8192, tokens=b"\1\0\0\0\3\0\0\0")) is Verdict.COLLISION
    assert judged(stream(PageMeta(8192))) is Verdict.COLLISION
    assert judged(stream(), PageMeta(8192)) is Verdict.GOOD


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        bytes(8400),
        stream()[:-1],
        stream() + b"x",
        stream(PageMeta(100), BODY[:100]),
        b"".join(encode_page(key_of("other"), META, BODY, PageCoder(), created_at=1.0)),
    ],
    ids=["empty", "shorter than a header", "zeros", "cut", "longer", "another length", "another key"],
)
def test_anything_else_is_corrupt(data: bytes) -> None:
    assert judged(data) is Verdict.CORRUPT


@given(position=st.integers(0, 8 * (128 + 8 + 8192) - 1))
def test_every_flipped_bit_is_corrupt(position: int) -> None:
    data = bytearray(stream())
    sizes = part_sizes(len(data))
    data[position // 8] ^= 1 << position % 8

    verdict = judge(KEY, META, pour(bytes(data)), list(sizes), PageCoder())

    assert verdict is Verdict.CORRUPT


def test_an_encoded_page_that_does_not_decode_is_corrupt() -> None:
    header = encode_header(KEY, PageMeta(8192), BODY[:4000], created_at=1.0, codec=LosslessCodec.id)

    assert judged(header + bytes(BODY[:4000]), PageMeta(8192)) is Verdict.CORRUPT


def test_a_page_of_one_part_is_one_set_that_overwrites_nothing() -> None:
    buffers, num_replies = set_page([b"k"], [5], [b"ab", memoryview(b""), memoryview(b"cde")], 1500)

    assert num_replies == 1
    assert b"".join(buffers) == (b"*6\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nabcde\r\n$2\r\nPX\r\n$4\r\n1500\r\n$2\r\nNX\r\n")


def test_a_page_of_several_parts_is_one_transaction() -> None:
    buffers, num_replies = set_page([b"k", b"k\1"], [4, 3], [b"ab", memoryview(b"cdefg")], None)

    assert num_replies == 4
    assert b"".join(buffers) == (
        b"*1\r\n$5\r\nMULTI\r\n"
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\nabcd\r\n"
        b"*3\r\n$3\r\nSET\r\n$2\r\nk\x01\r\n$3\r\nefg\r\n"
        b"*1\r\n$4\r\nEXEC\r\n"
    )


def test_sending_copies_no_page() -> None:
    body = bytearray(100)

    buffers, _ = set_page([b"k"], [100], [memoryview(body)], None)
    body[:] = b"x" * 100

    assert b"x" * 100 in b"".join(buffers)
