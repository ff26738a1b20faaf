"""A tier that checks nothing, made safe: what is read is what was written here, or a miss."""

from __future__ import annotations

import pytest

from kvstore.page import PageMeta
from kvstore.testing.pages import TIMEOUT_S, fetch, key_of, keys_of, payload, store
from kvstore.tiers.base import Claimable
from kvstore.tiers.checked import CheckedTier
from tests.helpers.sloppy_tier import Sloppy

SIZE = 8192


@pytest.fixture
def sloppy() -> Sloppy:
    return Sloppy()


def test_what_was_written_reads_back(sloppy: Sloppy) -> None:
    tier, keys = CheckedTier(sloppy), keys_of("page", 3)

    assert store(tier, keys, SIZE) == [True] * 3
    assert fetch(tier, keys, SIZE) == [payload(key, SIZE) for key in keys]
    assert tier.contains([*keys, key_of("other")], timeout_s=TIMEOUT_S) == [True] * 3 + [False]


def test_a_flipped_bit_and_a_page_in_the_wrong_place_are_counted_misses_and_dropped(sloppy: Sloppy) -> None:
    tier, (a, b, c) = CheckedTier(sloppy), keys_of("page", 3)
    store(tier, [a, b, c], SIZE)
    sloppy.pages[a] = bytes([sloppy.pages[a][0] ^ 1]) + sloppy.pages[a][1:]
    sloppy.pages[b] = sloppy.pages[c]

    assert fetch(tier, [a, b, c], SIZE) == [None, None, payload(c, SIZE)]
    assert tier.counters.corrupt_pages == 2
    assert set(sloppy.pages) == {c}


def test_pages_of_an_earlier_process_are_misses_until_they_are_written_again(sloppy: Sloppy) -> None:
    keys = keys_of("page", 1)
    store(CheckedTier(sloppy), keys, SIZE)
    tier = CheckedTier(sloppy)

    assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False]
    assert fetch(tier, keys, SIZE) == [None]
    assert store(tier, keys, SIZE) == [True]
    assert fetch(tier, keys, SIZE) == [payload(keys[0], SIZE)]


def test_tokens_that_differ_are_a_miss(sloppy: Sloppy) -> None:
    tier, key = CheckedTier(sloppy), key_of("page")
    store(tier, [key], SIZE, meta=PageMeta(SIZE, tokens=b"\1\0\0\0"))

    assert fetch(tier, [key], SIZE, meta=PageMeta(SIZE, tokens=b"\2\0\0\0")) == [None]


def test_evicted_and_deleted_pages_are_forgotten_and_a_tier_without_claims_has_none(sloppy: Sloppy) -> None:
    tier, (a, b) = CheckedTier(sloppy), keys_of("page", 2)
    store(tier, [a], SIZE)
    store(tier, [b], SIZE, evict=[a])
    tier.delete([b], timeout_s=TIMEOUT_S)

    assert tier._sums == {}
    assert not isinstance(tier, Claimable)
