"""Frames and messages: what goes in comes out, and nothing else is taken."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import RequestError
from kvstore.plan.records import (
    CutReason,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
)
from kvstore.service import protocol
from kvstore.service.protocol import HEADER, Op, ProtocolError, Reader, Status
from radix.hashing import BlockHash

COUNTS = st.integers(0, 2**32 - 1)
PAGES = st.lists(st.builds(SlotPage, COUNTS, st.integers(0, 65535), st.integers(0, 2**31)), max_size=20).map(tuple)
TIERS = st.dictionaries(st.sampled_from(["host", "disk", "redis"]), COUNTS)
STATUS = st.builds(LeaseStatus, st.sampled_from(LeaseState), COUNTS, COUNTS)
KEYS = st.lists(st.binary(min_size=32, max_size=32).map(BlockHash), max_size=20)


@given(st.sampled_from(Op), st.binary(max_size=100), st.integers(0, 2**32 - 1), st.sampled_from(Status))
def test_a_frame_comes_back(op: Op, body: bytes, sequence: int, status: Status) -> None:
    raw = protocol.encode_frame(op, body, sequence, status)

    frame = protocol.decode_header(raw[: HEADER.size])

    assert frame == (op, status, len(body), sequence)
    assert raw[HEADER.size :] == body


@given(st.binary(min_size=16, max_size=16))
def test_a_header_of_anything_is_a_frame_or_refused(raw: bytes) -> None:
    try:
        frame = protocol.decode_header(raw)
    except ProtocolError:
        return
    assert frame.num_bytes <= protocol.MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (HEADER.pack(0x1234, 1, 1, 0, 0, 0), "starts with 0x1234"),
        (HEADER.pack(protocol.MAGIC, 9, 1, 0, 0, 0), "protocol version 9"),
        (HEADER.pack(protocol.MAGIC, 1, 200, 0, 0, 0), "op 200"),
        (HEADER.pack(protocol.MAGIC, 1, 1, 0, 1 << 30, 0), "announces 1073741824 bytes"),
    ],
)
def test_a_wrong_header_is_told(raw: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        protocol.decode_header(raw)


@given(st.builds(Match, COUNTS, COUNTS, st.booleans(), TIERS, COUNTS, st.sampled_from(CutReason)))
def test_a_match_comes_back(match: Match) -> None:
    assert protocol.decode_match(protocol.encode_match(match)) == match


@given(st.builds(LoadLease, st.just(7), COUNTS, COUNTS, PAGES, TIERS), STATUS)
def test_a_load_lease_comes_back(lease: LoadLease, status: LeaseStatus) -> None:
    assert protocol.decode_load(protocol.encode_load(lease, status), 7, 0) == (lease, status)


@given(st.builds(SaveLease, st.just(7), PAGES, COUNTS))
def test_a_save_lease_comes_back_with_its_slots_in_the_right_slab(lease: SaveLease) -> None:
    back = protocol.decode_save(protocol.encode_save(lease), 7, 1 << 32)

    assert [(p.block, p.group, p.slot - (1 << 32)) for p in back.pages] == [
        (p.block, p.group, p.slot) for p in lease.pages
    ]
    assert back.skipped == lease.skipped


@given(STATUS)
def test_a_status_comes_back(status: LeaseStatus) -> None:
    assert protocol.decode_status(protocol.encode_status(status)) == status


@given(KEYS, st.integers(0, 20), st.integers(1, 2**40))
def test_a_request_comes_back_from_its_base(keys: list[BlockHash], base: int, num_tokens: int) -> None:
    base = min(base, len(keys))
    options = RequestOptions(
        session="é", priority=-2, ttl_s=1.5, retain_until=3.0, pin=True, single_flight=True, step_blocks=4
    )
    request = Request(9, keys, num_tokens, options)

    reader = Reader(protocol.encode_request(request, base, len(keys)))
    part = protocol.read_request(reader)
    reader.end()

    assert (part.id, part.base, part.keys, part.num_tokens) == (9, base, keys[base:], num_tokens)
    assert part.options == (options if base == 0 else None)


@given(st.one_of(st.none(), st.lists(st.booleans(), max_size=30)))
def test_filled_flags_come_back(filled: list[bool] | None) -> None:
    assert protocol.read_complete(Reader(protocol.encode_complete(5, filled))) == (5, filled)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(raw: bytes) -> None:
    for read in (
        protocol.read_request,
        protocol.read_prepare,
        protocol.read_complete,
        protocol.read_wait,
        protocol.read_finished,
        protocol.read_timeout,
    ):
        with suppress(ProtocolError, RequestError):
            read(Reader(raw))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"session": 3}, "options.session is 3"),
        ({"priority": True}, "options.priority is True"),
        ({"priority": 1 << 40}, "options.priority is"),
        ({"pin": 1}, "options.pin is 1"),
        ({"step_blocks": 0}, "options.step_blocks is 0"),
        ({"colour": "red"}, "options.colour is not known"),
    ],
)
def test_wrong_options_name_the_field(options: dict[str, object], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        protocol.options_from_json(options)


def test_a_request_with_too_many_keys_is_refused_before_they_are_read() -> None:
    raw = protocol._REQUEST.pack(1, protocol.MAX_KEYS, 1, 1, 0)

    with pytest.raises(ProtocolError, match="keys; at most"):
        protocol.read_request(Reader(raw))


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 1e6])
def test_a_wait_is_bounded(timeout_s: float) -> None:
    with pytest.raises(ProtocolError, match="timeout"):
        protocol.check_timeout(timeout_s)


def test_deep_json_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        protocol.decode_json(b"[" * 100_000)


def test_slots_of_pages_are_packed_tightly() -> None:
    pages = tuple(SlotPage(int(n), 0, int(n)) for n in np.arange(1000))

    assert len(protocol.encode_save(SaveLease(1, pages))) == 8 + 10 * 1000
