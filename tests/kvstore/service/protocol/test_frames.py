"""Frames: what goes in comes out, and nothing else is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.service.protocol import frames
from kvstore.service.protocol.frames import HEADER, Kind, OtherVersion, ProtocolError, ReplyStatus


@given(st.sampled_from(Kind), st.binary(max_size=100), st.integers(0, 2**32 - 1), st.sampled_from(ReplyStatus))
def test_a_frame_comes_back(kind: Kind, body: bytes, sequence: int, status: ReplyStatus) -> None:
    raw = frames.encode_frame(kind, body, sequence, status)

    frame = frames.decode_header(raw[: HEADER.size])

    assert frame == (kind, status, len(body), sequence)
    assert raw[HEADER.size :] == body


@given(st.binary(min_size=16, max_size=16))
def test_a_header_of_anything_is_a_frame_or_refused(raw: bytes) -> None:
    try:
        frame = frames.decode_header(raw)
    except ProtocolError:
        return
    assert frame.num_bytes <= frames.MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (HEADER.pack(0x1234, 1, 1, 0, 0, 0), "starts with 0x1234"),
        (HEADER.pack(frames.MAGIC, 9, 1, 0, 0, 0), "the other side speaks version 9 of the protocol"),
        (HEADER.pack(frames.MAGIC, frames.VERSION, 200, 0, 0, 0), "kind 200"),
        (HEADER.pack(frames.MAGIC, frames.VERSION, 1, 0, 1 << 30, 0), "announces 1073741824 bytes"),
    ],
)
def test_a_wrong_header_is_told(raw: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        frames.decode_header(raw)


def test_a_frame_of_another_version_says_which() -> None:
    with pytest.raises(OtherVersion) as told:
        frames.decode_header(frames.encode_frame(Kind.HELLO, version=1)[: HEADER.size])

    assert told.value.version == 1


def test_deep_json_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        frames.decode_json(b"[" * 100_000)
