"""Messages: what goes in comes out, and nothing else is taken."""

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
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import ProtocolError, Reader
from radix.hashing import BlockHash

COUNTS = st.integers(0, 2**32 - 1)
PAGES = st.lists(st.builds(SlotPage, COUNTS, st.integers(0, 65535), st.integers(0, 2**31)), max_size=20).map(tuple)
TIERS = st.dictionaries(st.sampled_from(["host", "disk", "redis"]), COUNTS)
STATUS = st.builds(LeaseStatus, st.sampled_from(LeaseState), COUNTS, COUNTS)
KEYS = st.lists(st.binary(min_size=32, max_size=32).map(BlockHash), max_size=20)


@given(st.builds(Match, COUNTS, COUNTS, st.booleans(), TIERS, COUNTS, st.sampled_from(CutReason)))
def test_a_match_comes_back(match: Match) -> None:
    assert messages.decode_match(messages.encode_match(match)) == match


@given(st.builds(LoadLease, st.just(7), COUNTS, COUNTS, PAGES, TIERS), STATUS)
def test_a_load_lease_comes_back(lease: LoadLease, status: LeaseStatus) -> None:
    assert messages.decode_load(messages.encode_load(lease, status), 7, 0) == (lease, status)


@given(st.builds(SaveLease, st.just(7), PAGES, COUNTS))
def test_a_save_lease_comes_back_with_its_slots_in_the_right_slab(lease: SaveLease) -> None:
    back = messages.decode_save(messages.encode_save(lease), 7, 1 << 32)

    assert [(p.block, p.group, p.slot - (1 << 32)) for p in back.pages] == [
        (p.block, p.group, p.slot) for p in lease.pages
    ]
    assert back.skipped == lease.skipped


@given(STATUS)
def test_a_status_comes_back(status: LeaseStatus) -> None:
    assert messages.decode_status(messages.encode_status(status)) == status


@given(KEYS, st.integers(0, 20), st.integers(1, 2**40))
def test_a_request_comes_back_from_its_base(keys: list[BlockHash], base: int, num_tokens: int) -> None:
    base = min(base, len(keys))
    options = RequestOptions(
        session="é", priority=-2, ttl_s=1.5, retain_until=3.0, pin=True, single_flight=True, step_blocks=4
    )
    request = Request(9, keys, num_tokens, options)

    reader = Reader(messages.encode_request(request, base, len(keys)))
    part = messages.read_request(reader)
    reader.end()

    assert (part.id, part.base, part.keys, part.num_tokens) == (9, base, keys[base:], num_tokens)
    assert part.options == (options if base == 0 else None)


@given(st.one_of(st.none(), st.lists(st.booleans(), max_size=30)))
def test_filled_flags_come_back(filled: list[bool] | None) -> None:
    assert messages.read_complete(Reader(messages.encode_complete(5, filled))) == (5, filled)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(raw: bytes) -> None:
    for read in (
        messages.read_request,
        messages.read_prepare,
        messages.read_complete,
        messages.read_wait,
        messages.read_finished,
        messages.read_timeout,
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
        ({"step_blocks": 10**30}, "options.step_blocks is 1000"),
        ({"priority": 10**400}, "options.priority is 1000"),
        ({"priority": -(10**5000)}, "options.priority is a number of very many digits"),
        ({"retain_until": int("9" * 400)}, "options.retain_until is 9999"),
        ({"retain_until": float("inf")}, "options.retain_until is inf"),
        ({"retain_until": float("nan")}, "options.retain_until is nan"),
        ({"retain_until": -1}, "options.retain_until is -1"),
        ({"retain_until": True}, "options.retain_until is True"),
        ({"ttl_s": int("9" * 400)}, "options.ttl_s is 9999"),
        ({"ttl_s": 1e300}, "options.ttl_s is 1e"),
        ({"ttl_s": float("nan")}, "options.ttl_s is nan"),
        ({"ttl_s": 0}, "options.ttl_s is 0"),
        ({"session": "s" * 1025}, "options.session is 'sss.*at most 1024 bytes"),
        ({"session": "\ud800"}, "options.session is"),
        ({"x" * 500: 1}, "options.xxx.* is not known"),
        ({"colour": "red"}, "options.colour is not known"),
    ],
)
def test_wrong_options_name_the_field(options: dict[str, object], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        messages.options_from_json(options)


def test_a_request_with_too_many_keys_is_refused_before_they_are_read() -> None:
    raw = messages._REQUEST.pack(1, messages.MAX_KEYS, 1, 1, 0, 0)

    with pytest.raises(RequestError, match="blocks; a daemon takes at most"):
        messages.read_request(Reader(raw))


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 1e6])
def test_a_wait_is_bounded(timeout_s: float) -> None:
    with pytest.raises(ProtocolError, match="timeout"):
        messages.check_timeout(timeout_s)


def test_slots_of_pages_are_packed_tightly() -> None:
    pages = tuple(SlotPage(int(n), 0, int(n)) for n in np.arange(1000))

    assert len(messages.encode_save(SaveLease(1, pages))) == 8 + 10 * 1000
