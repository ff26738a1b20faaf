"""The tier that fails on command does what it is told, and nothing else."""

from __future__ import annotations

import pytest

from kvstore.errors import TierUnavailable
from kvstore.page import PageMeta
from kvstore.testing.pages import fetch, keys_of, payload, slots, store
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import RUBBISH, Chances, FaultyTier
from tests.helpers.lanes import PAGE_BYTES, SLOT_BYTES

META = PageMeta(PAGE_BYTES)


def answers(tier: FaultyTier) -> bool:
    try:
        tier.ping(timeout_s=1.0)
    except TierUnavailable:
        return False
    return True


def test_without_faults_it_is_the_tier_inside(tier: FaultyTier) -> None:
    keys = keys_of("page", 3)

    assert store(tier, keys, SLOT_BYTES, meta=META) == [True] * 3
    assert fetch(tier, keys, SLOT_BYTES, meta=META) == [payload(key, PAGE_BYTES) for key in keys]
    assert tier.contains(keys, timeout_s=1.0) == [True] * 3
    assert tier.touch(keys[:1], expires_at=0.0, timeout_s=1.0) == [True]
    tier.delete(keys[:1], timeout_s=1.0)
    assert [page.key for page in tier.scan()] == keys[1:]
    assert tier.capacity_pages == 256


def test_lost_writes_claim_to_be_stored(tier: FaultyTier) -> None:
    keys = keys_of("page", 3)
    tier.lose_next(2)

    assert store(tier, keys, SLOT_BYTES, meta=META) == [True] * 3

    assert tier.contains(keys, timeout_s=1.0) == [False, False, True]


def test_lost_reads_are_misses_and_stay_so(tier: FaultyTier) -> None:
    keys = keys_of("page", 2)
    store(tier, keys, SLOT_BYTES, meta=META)
    tier.lose_next(1)

    assert fetch(tier, keys, SLOT_BYTES, meta=META) == [None, payload(keys[1], PAGE_BYTES)]
    assert tier.contains(keys, timeout_s=1.0) == [False, True]


def test_a_corrupt_page_leaves_rubbish_in_its_slot_and_is_a_counted_miss(tier: FaultyTier) -> None:
    keys = keys_of("page", 2)
    store(tier, keys, SLOT_BYTES, meta=META)
    tier.corrupt_next(1)
    views = slots(2, SLOT_BYTES)

    assert tier.read_into(keys, views, [META] * 2, timeout_s=1.0) == [False, True]

    assert bytes(views[0]) == bytes([RUBBISH]) * SLOT_BYTES
    assert tier.counters.corrupt_pages == 1
    assert tier.contains(keys, timeout_s=1.0) == [False, True]


def test_it_fails_as_often_as_told_and_only_where_told(tier: FaultyTier) -> None:
    tier.fail(times=2, only=("contains",))

    tier.ping(timeout_s=1.0)
    for _ in range(2):
        with pytest.raises(TierUnavailable):
            tier.contains([], timeout_s=1.0)
    assert tier.contains([], timeout_s=1.0) == []


def test_a_hanging_call_gives_up_when_its_time_is_over(tier: FaultyTier) -> None:
    tier.hang()

    with pytest.raises(TierUnavailable, match=r"within 0\.01 s"):
        tier.ping(timeout_s=0.01)


def test_a_slow_call_takes_its_time_or_all_it_was_given() -> None:
    slept: list[float] = []
    tier = FaultyTier(MemoryTier(8, SLOT_BYTES), sleep=slept.append)
    tier.slow_down(2.0)

    tier.ping(timeout_s=5.0)
    with pytest.raises(TierUnavailable):
        tier.ping(timeout_s=0.5)

    assert slept == [2.0, 0.5]


def test_chances_follow_the_seed() -> None:
    def history(seed: int) -> list[bool]:
        tier = FaultyTier(MemoryTier(64, SLOT_BYTES), chances=Chances(unavailable=0.5), seed=seed)
        return [answers(tier) for _ in range(64)]

    assert history(1) == history(1)
    assert history(1) != history(2)
    assert 10 < sum(history(1)) < 54
