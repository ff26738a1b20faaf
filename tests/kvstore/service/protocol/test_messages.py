"""Messages: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import RequestError
from kvstore.plan.records import (
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
    SaveLease,
    SlotPage,
    SlotPages,
)
from kvstore.requests import check_options
from kvstore.service.protocol import events, messages
from kvstore.service.protocol.frames import MAX_BODY_BYTES, ProtocolError
from kvstore.service.protocol.messages import encode, read_call
from kvstore.service.protocol.replies import (
    CallReply,
    FlushReply,
    LoadReply,
    MatchReply,
    PageColumns,
    SaveReply,
    StatusReply,
)
from radix.hashing import BlockHash

COUNTS = st.integers(0, 2**32 - 1)
PAGES = st.lists(
    st.builds(SlotPage, st.integers(0, 2**31 - 1), st.integers(0, 2**15 - 1), st.integers(0, 2**32 - 1)), max_size=20
).map(SlotPages.of)
TIERS = st.dictionaries(st.sampled_from(["host", "disk", "redis"]), COUNTS)
STATUS = st.builds(LeaseStatus, st.sampled_from(LeaseState), COUNTS, COUNTS)
KEYS = st.lists(st.binary(min_size=32, max_size=32).map(BlockHash), max_size=20)
ANSWERS = [*CallReply.__subclasses__()]
PART = messages.RequestPart(1, 0, [], 16, 0)


@given(st.builds(Match, COUNTS, COUNTS, st.booleans(), TIERS, COUNTS, st.sampled_from(CutReason)))
def test_a_match_comes_back(match: Match) -> None:
    assert MatchReply.read(encode(MatchReply.of(match))).match() == match


@given(st.builds(LoadLease, st.just(7), COUNTS, COUNTS, PAGES, TIERS), STATUS)
def test_a_load_lease_comes_back(lease: LoadLease, status: LeaseStatus) -> None:
    back = LoadReply.read(encode(LoadReply.of(lease, status)))

    assert (back.lease(7, 0), back.status.status()) == (lease, status)


@given(st.builds(SaveLease, st.just(7), PAGES, COUNTS))
def test_a_save_lease_comes_back_with_its_slots_in_the_right_slab(lease: SaveLease) -> None:
    back = SaveReply.read(encode(SaveReply.of(lease))).lease(7, 1 << 32)

    assert [(p.block, p.group, p.slot - (1 << 32)) for p in back.pages] == [
        (p.block, p.group, p.slot) for p in lease.pages
    ]
    assert back.skipped == lease.skipped


@given(STATUS)
def test_a_status_comes_back(status: LeaseStatus) -> None:
    assert StatusReply.read(encode(StatusReply.of(status))).status() == status


def test_the_result_of_a_flush_comes_back() -> None:
    result = FlushResult(False, {"disk": 3}, {"disk": {"waiting": 1}}, {"redis": {"out": 2}})

    assert FlushReply.read(encode(FlushReply.of(result))).result() == result


@given(KEYS, st.integers(0, 20), st.integers(1, 2**40))
def test_a_request_comes_back_from_its_base(keys: list[BlockHash], base: int, num_tokens: int) -> None:
    base = min(base, len(keys))
    options = RequestOptions(
        session="é", priority=-2, ttl_s=1.5, retain_until=3.0, pin=True, single_flight=True, step_blocks=4
    )
    request = Request(9, keys, num_tokens, options)

    call = read_call(encode(messages.PinCall(messages.part_of(request, base, len(keys)))))

    assert isinstance(call, messages.PinCall)
    part = call.request
    assert (part.id, part.base, part.keys, part.num_tokens) == (9, base, keys[base:], num_tokens)
    assert (part.options and part.options.options()) == (options if base == 0 else None)


def test_usual_options_are_not_sent() -> None:
    assert messages.part_of(Request(1, [], 16, RequestOptions(tenant="a")), 0, 0).options is None


@given(st.one_of(st.none(), st.lists(st.booleans(), max_size=30)))
def test_filled_flags_come_back(filled: list[bool] | None) -> None:
    assert read_call(encode(messages.CompleteCall(5, messages.flags(filled)))) == messages.CompleteCall(5, filled)


def test_numbers_of_numpy_are_sent_as_what_they_are() -> None:
    request = Request(1, [], np.int64(32), RequestOptions(priority=np.int32(2), ttl_s=np.float64(1.5)))  # type: ignore[arg-type]
    flags = messages.flags(np.array([True, False]))  # type: ignore[arg-type]

    part = messages.part_of(request, 0, 0)
    call = read_call(encode(messages.PrepareLoadCall(part, 1, np.int64(1), np.uint32(2), "")))  # type: ignore[arg-type]

    assert isinstance(call, messages.PrepareLoadCall)
    assert (call.first, call.end, call.request.num_tokens) == (1, 2, 32)
    assert call.request.options == messages.Options(priority=2, ttl_s=1.5)
    assert read_call(encode(messages.CompleteCall(1, flags))) == messages.CompleteCall(1, [True, False])


def test_a_promise_of_more_digits_than_a_message_takes_is_sent_as_a_float() -> None:
    part = messages.part_of(Request(1, [], 16, RequestOptions(retain_until=10**30)), 0, 0)

    call = read_call(encode(messages.PinCall(part)))

    assert isinstance(call, messages.PinCall)
    assert call.request.options == messages.Options(retain_until=1e30)


SAMPLES = [
    messages.LookupCall(PART, 1.0),
    messages.PrepareSaveCall(
        messages.RequestPart(1, 0, [BlockHash(b"k" * 32)], 16, 0, messages.Options("s")), 1, 0, 1, "o"
    ),
    messages.CompleteCall(1, [True, False]),
    messages.FinishedCall(PART, "stop", True),
    messages.ObservePrefillCall(10, 0.5),
    messages.FlushCall(1.0),
    messages.StatsCall(),
]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(raw: bytes) -> None:
    for read in (read_call, *(answer.read for answer in ANSWERS)):
        with suppress(ProtocolError):
            read(raw)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_message_with_other_bytes_in_it_is_a_message_or_a_protocol_error(call: messages.Call, data: Any) -> None:
    raw = bytearray(encode(call))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not raw:
            break

    with suppress(ProtocolError):
        assert isinstance(read_call(bytes(raw)), messages.Call)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.integers(0, 30), st.lists(ODD, max_size=6))
def test_a_verb_with_any_fields_is_a_message_or_a_protocol_error(verb: int, odd: list[object]) -> None:
    with suppress(ProtocolError):
        assert isinstance(read_call(msgspec.msgpack.encode([verb, *odd])), messages.Call)


def test_verbs_have_numbers_of_their_own() -> None:
    numbers = [kind.__struct_config__.tag for kind in messages.Call.__subclasses__()]

    assert len(set(numbers)) == len(numbers)
    assert not {1, 2, 9, 19, 20} & set(numbers)  # of the protocol before, and gone


def part(**fields: object) -> list[object]:
    values: dict[str, object] = {"id": 1, "base": 0, "keys": [], "num_tokens": 16, "held": 0, "options": None}
    return list((values | fields).values())


OUT_OF_BOUNDS: dict[str, list[object]] = {
    "a request's number": [23, part(id=-1)],
    "where its keys begin": [23, part(base=messages.MAX_KEYS + 1)],
    "how many keys are brought": [23, part(keys=[b"k" * 32] * (messages.PIECE_KEYS + 1))],
    "the length of a key": [23, part(keys=[b"k" * 33])],
    "its tokens": [23, part(num_tokens=1 << 63)],
    "the blocks that an engine holds": [23, part(held=1 << 32)],
    "the first block": [4, part(), 1, -1, 1, ""],
    "the last block": [4, part(), 1, 0, 1 << 32, ""],
    "the length of an owner": [4, part(), 1, 0, 1, "x" * (messages.MAX_TEXT + 1)],
    "how many flags there are": [7, 1, [True] * (messages.MAX_LEASE_PAGES + 1)],
    "the type of a flag": [7, 1, [1]],
    "the length of a reason": [12, part(), "x" * (messages.MAX_TEXT + 1), False],
    "the tokens of a prefill": [16, 0, 1.0],
    "the seconds of a prefill": [16, 1, 0.0],
    "seconds without end": [16, 1, math.inf],
    "the length of a session": [23, part(options=["x" * (messages.MAX_TEXT + 1)])],
    "the number of options": [23, part(options=["", 0, None, 0.0, False, False, 1, False, 1])],
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_every_number_and_length_is_bounded(name: str) -> None:
    with pytest.raises(ProtocolError, match="is not valid"):
        read_call(msgspec.msgpack.encode(OUT_OF_BOUNDS[name]))


@pytest.mark.parametrize("timeout_s", [-1.0, math.nan, math.inf, 1e6])
@pytest.mark.parametrize(
    "make",
    [
        lambda timeout_s: messages.LookupCall(PART, timeout_s),
        lambda timeout_s: messages.PeekCall(PART, timeout_s),
        lambda timeout_s: messages.WaitCall(1, timeout_s),
        messages.FlushCall,
        messages.EventsCall,
    ],
)
def test_a_wait_is_bounded(make: Callable[[float], messages.Call], timeout_s: float) -> None:
    with pytest.raises(ProtocolError, match="is not valid"):
        read_call(encode(make(timeout_s)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"priority": 1 << 40}, "options.priority is"),
        ({"step_blocks": 0}, "options.step_blocks is 0"),
        ({"step_blocks": 1 << 62}, "options.step_blocks is 4611"),
        ({"retain_until": float("inf")}, "options.retain_until is inf"),
        ({"retain_until": float("nan")}, "options.retain_until is nan"),
        ({"retain_until": -1}, "options.retain_until is -1"),
        ({"ttl_s": 1e300}, "options.ttl_s is 1e"),
        ({"ttl_s": float("nan")}, "options.ttl_s is nan"),
        ({"ttl_s": 0}, "options.ttl_s is 0"),
        ({"session": "é" * 1000}, "options.session is 'ééé.*at most 1024 bytes"),
    ],
)
def test_options_that_a_message_can_carry_are_checked_as_all_are(options: dict[str, Any], told: str) -> None:
    sent = messages.Options(**options)

    call = read_call(encode(messages.PinCall(messages.RequestPart(1, 0, [], 16, 0, sent))))

    assert isinstance(call, messages.PinCall)
    assert call.request.options is not None
    with pytest.raises(RequestError, match=told):
        check_options(call.request.options.options())


@pytest.mark.parametrize(("blocks", "groups", "slots"), [(1, 1, 2), (2, 1, 1), (1, 2, 1), (0, 0, 1)])
def test_columns_of_different_lengths_are_no_pages(blocks: int, groups: int, slots: int) -> None:
    columns = PageColumns(bytes(4 * blocks), bytes(2 * groups), bytes(4 * slots))

    with pytest.raises(ProtocolError, match="not equally many"):
        columns.pages(0)


def test_a_column_that_ends_within_a_number_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not equally many"):
        PageColumns(b"1234", b"12", b"12345").pages(0)


def test_pages_are_packed_tightly_and_the_most_of_them_fit_into_one_answer() -> None:
    def size(num_pages: int) -> int:
        numbers = np.arange(num_pages)
        return len(encode(SaveReply.of(SaveLease(1, SlotPages(numbers, numbers % 7, numbers)))))

    assert size(1000) < 10 * 1000 + 32
    assert size(messages.MAX_LEASE_PAGES) < MAX_BODY_BYTES


def test_the_most_keys_of_a_message_fit_into_one() -> None:
    keys = [BlockHash(bytes(32))] * messages.PIECE_KEYS

    assert len(encode(messages.KeysCall(messages.RequestPart(1, 0, keys, 1, 0)))) < MAX_BODY_BYTES
    assert len(encode(events.EventPiece(events.Event.STORED, 0.0, "", 0, keys[: events.KEYS_PER_PIECE]))) < 1 << 20
