from __future__ import annotations

import pytest

from connectors.vllm_tier import lookup
from connectors.vllm_tier.lookup import ANSWER_S, FAILED_S, LookupAnswer, Lookups
from kvstore.testing.pages import FakeClock

BOTH = ("disk", "redis")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


@pytest.fixture
def lookups(clock: FakeClock) -> Lookups:
    return Lookups(0.05, clock)


def test_a_chunk_is_asked_about_once_and_then_known(lookups: Lookups) -> None:
    assert lookups.lookup(b"a", BOTH) is LookupAnswer.ASK_AGAIN
    assert lookups.lookup(b"a", BOTH) is LookupAnswer.ASK_AGAIN
    assert lookups.take_questions() == [b"a"]
    assert lookups.take_questions() == []

    lookups.heard("redis", [b"a"], [True])

    assert lookups.lookup(b"a", BOTH) is LookupAnswer.HIT
    assert lookups.where(b"a", ("redis",)) == ["redis"]


def test_a_load_may_fall_back_on_a_tier_that_has_not_answered_but_not_on_one_without(lookups: Lookups) -> None:
    lookups.lookup(b"a", BOTH)
    lookups.heard("disk", [b"a"], [True])
    assert lookups.where(b"a", BOTH) == ["disk", "redis"]

    lookups.heard("redis", [b"a"], [False])
    assert lookups.where(b"a", BOTH) == ["disk"]


def test_a_miss_needs_the_answer_of_every_tier(lookups: Lookups) -> None:
    lookups.lookup(b"a", BOTH)

    lookups.heard("disk", [b"a"], [False])
    assert lookups.lookup(b"a", BOTH) is LookupAnswer.ASK_AGAIN

    lookups.heard("redis", [b"a"], [False])
    assert lookups.lookup(b"a", BOTH) is LookupAnswer.MISS


def test_a_tier_that_does_not_answer_in_time_is_a_miss_and_counts_when_it_does(
    lookups: Lookups, clock: FakeClock
) -> None:
    lookups.lookup(b"a", BOTH)
    clock.advance(0.06)

    assert lookups.lookup(b"a", BOTH) is LookupAnswer.MISS
    assert lookups.num_late == 1

    lookups.heard("redis", [b"a"], [True])
    assert lookups.lookup(b"a", BOTH) is LookupAnswer.HIT


def test_without_a_tier_that_is_up_it_is_a_miss_at_once_and_nothing_is_asked(lookups: Lookups) -> None:
    assert lookups.lookup(b"a", ()) is LookupAnswer.MISS
    assert not lookups.is_asking


def test_a_hit_on_a_tier_that_went_down_is_none(lookups: Lookups) -> None:
    lookups.lookup(b"a", BOTH)
    lookups.heard("disk", [b"a"], [True])
    lookups.heard("redis", [b"a"], [False])

    assert lookups.lookup(b"a", ("redis",)) is LookupAnswer.MISS


def test_a_miss_is_not_asked_again_until_it_is_old(lookups: Lookups, clock: FakeClock) -> None:
    lookups.lookup(b"a", ("disk",))
    lookups.take_questions()
    lookups.heard("disk", [b"a"], [False])

    clock.advance(ANSWER_S - 0.1)
    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.MISS

    clock.advance(0.2)
    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.ASK_AGAIN


def test_a_chunk_that_failed_is_not_offered_until_it_is_stored_anew(lookups: Lookups, clock: FakeClock) -> None:
    lookups.lookup(b"a", ("disk",))
    lookups.heard("disk", [b"a"], [True])

    lookups.failed([b"a"])
    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.MISS

    lookups.stored("disk", [b"a"])
    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.ASK_AGAIN


def test_a_chunk_that_failed_is_offered_again_after_a_while(lookups: Lookups, clock: FakeClock) -> None:
    lookups.failed([b"a"])

    clock.advance(FAILED_S + 1)

    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.ASK_AGAIN


def test_a_chunk_stored_after_a_miss_is_a_hit(lookups: Lookups) -> None:
    lookups.lookup(b"a", ("disk",))
    lookups.heard("disk", [b"a"], [False])

    lookups.stored("disk", [b"a"])

    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.HIT


def test_memory_for_answers_is_bounded(lookups: Lookups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MAX_ANSWERS", 3)

    for key in (b"a", b"b", b"c", b"d"):
        lookups.lookup(key, ("disk",))
        lookups.failed([key + b"!"])

    assert lookups.num_known == 3
    lookups.heard("disk", [b"a", b"d"], [True, True])
    assert lookups.lookup(b"d", ("disk",)) is LookupAnswer.HIT
    assert lookups.lookup(b"a", ("disk",)) is LookupAnswer.ASK_AGAIN
    assert lookups.lookup(b"a!", ("disk",)) is LookupAnswer.ASK_AGAIN
    assert lookups.lookup(b"d!", ("disk",)) is LookupAnswer.MISS
