from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

import pytest

from eviction.lru import Lru
from eviction.policy import EvictionPolicy, Hint
from eviction.s3fifo import S3Fifo
from eviction.sieve import Sieve
from eviction.ttl import Ttl
from kvstore.testing.contracts.policy import EvictionPolicyContract


class TestTtlNever(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Ttl(Lru())


class TestTtlFarAway(EvictionPolicyContract):
    """Deadlines are kept, but none is reached within the suite."""

    def new_policy(self) -> EvictionPolicy[str]:
        return Ttl(Lru(), ttl_s=1e12)


class TestTtlOverSieve(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Ttl(Sieve(), ttl_s=1e12)


class TestTtlOverS3Fifo(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Ttl(S3Fifo(), ttl_s=1e12)


@pytest.fixture
def policy() -> Ttl[str]:
    return Ttl(Lru(), ttl_s=10.0)


def test_a_key_expires_at_its_deadline_and_not_before(policy: Ttl[str]) -> None:
    policy.add("a", 5.0)

    assert policy.expired(14.999) == []
    assert policy.expired(15.0) == ["a"]


def test_an_expired_key_stays_until_it_is_discarded(policy: Ttl[str]) -> None:
    policy.add("ab", 0.0)

    assert policy.expired(10.0) == policy.expired(11.0) == ["a", "b"]
    assert len(policy) == 2

    policy.discard("a")
    assert policy.expired(12.0) == ["b"]


def test_no_more_expired_keys_are_returned_than_are_asked_for_the_earliest_first(policy: Ttl[str]) -> None:
    policy.add("abcd", 0.0)
    policy.add("xyz", 0.0, Hint(ttl_s=5.0))
    policy.add("uv", 0.0, Hint(left_s=1.0))

    assert policy.expired(20.0, 1) == ["u"]
    assert policy.expired(20.0, 4) == ["u", "v", "x", "y"]
    assert policy.expired(20.0, 100) == policy.expired(20.0)


def test_overdue_are_those_of_some_keys_that_are_past_their_deadline(policy: Ttl[str]) -> None:
    policy.add("ab", 0.0)
    policy.add("c", 0.0, Hint(ttl_s=50.0))
    policy.add("d", 0.0, Hint(left_s=3.0))

    assert policy.overdue("dcba?", 2.0) == []
    assert policy.overdue("dcba?", 3.0) == ["d"]
    assert policy.overdue("dcba?", 10.0) == ["d", "b", "a"]
    assert policy.overdue("dcba?", 60.0, 2) == ["d", "c"]


@pytest.mark.parametrize("again", ["touch", "add"])
def test_a_use_moves_the_deadline(policy: Ttl[str], again: str) -> None:
    policy.add("ab", 0.0)
    getattr(policy, again)("a", 6.0)

    assert policy.expired(15.0) == ["b"]
    assert policy.expired(16.0) == ["b", "a"]


def test_an_expired_key_that_is_used_lives_again(policy: Ttl[str]) -> None:
    policy.add("a", 0.0)
    assert policy.expired(20.0) == ["a"]

    policy.touch("a", 20.0)

    assert policy.expired(29.0) == []
    assert policy.expired(30.0) == ["a"]


def test_demotion_does_not_move_the_deadline(policy: Ttl[str]) -> None:
    policy.add("a", 0.0)
    policy.demote("a")

    assert policy.expired(10.0) == ["a"]


def test_a_key_may_bring_its_own_ttl_and_keeps_it_when_used(policy: Ttl[str]) -> None:
    policy.add("short", 0.0)
    policy.add(["long"], 0.0, Hint(ttl_s=100.0))
    policy.touch(["long"], 50.0)

    assert "long" not in policy.expired(149.0)
    assert "long" in policy.expired(150.0)


@pytest.mark.parametrize("never", [0, 0.0, inf])
def test_a_key_may_live_for_ever(policy: Ttl[str], never: float) -> None:
    policy.add(["a"], 0.0, Hint(ttl_s=never))
    policy.touch(["a"], 1.0)

    assert policy.expired(1e12) == []


@pytest.mark.parametrize("never", [None, 0, 0.0, inf])
def test_a_policy_without_ttl_expires_nothing_but_keys_with_their_own(never: float | None) -> None:
    policy: Ttl[str] = Ttl(Lru(), never)
    policy.add("ab", 0.0)
    policy.add("b", 0.0, Hint(ttl_s=5.0))

    assert policy.expired(1e12) == ["b"]


def test_the_latest_hint_decides_the_ttl(policy: Ttl[str]) -> None:
    policy.add(["a"], 0.0, Hint(ttl_s=100.0))
    policy.add(["a"], 0.0)
    assert policy.expired(10.0) == ["a"]

    policy.add(["a"], 10.0, Hint(ttl_s=0))
    assert policy.expired(1e12) == []


def test_a_deadline_that_has_passed_already(policy: Ttl[str]) -> None:
    policy.add(["late"], 50.0, Hint(ttl_s=-1.0))

    assert policy.expired(50.0) == ["late"]


def test_a_discarded_key_does_not_expire(policy: Ttl[str]) -> None:
    policy.add("a", 0.0)
    policy.add("b", 0.0, Hint(ttl_s=3.0))
    policy.discard("ab")

    assert policy.expired(1e12) == []


def test_expired_keys_come_earliest_deadline_first_whatever_their_ttl(policy: Ttl[str]) -> None:
    policy.add("c", 0.0)  # 10
    policy.add("a", 0.0, Hint(ttl_s=2.0))
    policy.add("b", 0.0, Hint(ttl_s=9.0))
    policy.add("e", 0.0, Hint(ttl_s=100.0))
    policy.add("d", 1.0)  # 11

    assert policy.expired(50.0) == ["a", "b", "c", "d"]
    assert policy.expired(100.0) == ["a", "b", "c", "d", "e"]


def test_a_ttl_used_again_after_its_last_key_left(policy: Ttl[str]) -> None:
    policy.add("a", 0.0, Hint(ttl_s=3.0))
    policy.discard("a")
    policy.add("b", 1.0, Hint(ttl_s=3.0))

    assert policy.expired(3.5) == []
    assert policy.expired(4.0) == ["b"]
    policy.discard("b")
    assert policy.expired(9.0) == []
    policy.add("c", 9.0, Hint(ttl_s=3.0))
    assert policy.expired(12.0) == ["c"]


def test_victims_are_the_expired_first_then_as_the_inner_policy_says(policy: Ttl[str]) -> None:
    policy.add("abc", 0.0, Hint(ttl_s=0))
    policy.add("xy", 0.0)
    policy.expired(10.0)  # tells the time

    assert policy.victims(1) == ["x"]
    assert policy.victims(3) == ["x", "y", "a"]
    assert policy.victims(9) == ["x", "y", "a", "b", "c"]
    assert policy.victims(0) == []


def test_more_expired_keys_than_victims_asked_for(policy: Ttl[str]) -> None:
    policy.add("abcd", 0.0)
    policy.add("s", 0.0, Hint(ttl_s=1.0))
    policy.touch("", 99.0)

    assert policy.victims(3) == ["s", "a", "b"]


def test_a_clock_that_goes_back_a_little_stands_still(policy: Ttl[str]) -> None:
    policy.add("a", 100.0)
    policy.add("b", 99.5)

    assert policy.expired(109.5) == []
    assert policy.expired(110.0) == ["a", "b"]


def test_a_clock_that_is_set_back_leaves_no_key_more_time_than_its_ttl(policy: Ttl[str]) -> None:
    policy.add("a", 100.0)
    policy.add("b", 50.0, Hint(ttl_s=5.0))
    policy.add("c", 51.0)

    assert policy.expired(54.9) == []
    assert policy.expired(55.0) == ["b"]
    assert policy.expired(60.0) == ["b", "a"]
    assert policy.expired(61.0) == ["b", "a", "c"]


def test_a_key_that_had_less_left_when_the_clock_was_set_back_keeps_its_deadline(policy: Ttl[str]) -> None:
    policy.add("a", 93.0)
    policy.add("b", 100.0)
    policy.touch("", 95.0)

    assert policy.expired(102.9) == []
    assert policy.expired(103.0) == ["a"]
    assert policy.expired(105.0) == ["a", "b"]


def test_a_clock_that_is_set_forward_and_back_again_expires_what_is_past_its_deadline_then(policy: Ttl[str]) -> None:
    policy.add("a", 100.0)
    assert policy.expired(1e6) == ["a"]

    assert policy.expired(105.0) == []
    assert policy.expired(110.0) == ["a"]


def test_a_key_with_a_rest_expires_when_that_is_over(policy: Ttl[str]) -> None:
    policy.add("a", 0.0, Hint(left_s=3.0))
    policy.add("b", 0.0, Hint(left_s=2.0, ttl_s=50.0))
    policy.add("c", 0.0, Hint(left_s=-1.0))

    assert policy.expired(0.0) == ["c"]
    assert policy.expired(3.0) == policy.expired(3.0) == ["c", "b", "a"]


@pytest.mark.parametrize("again", ["touch", "add"])
def test_a_key_with_a_rest_has_its_whole_ttl_from_its_next_use_on(policy: Ttl[str], again: str) -> None:
    policy.add("a", 0.0, Hint(left_s=3.0))
    getattr(policy, again)("a", 2.0)

    assert policy.expired(11.9) == []
    assert policy.expired(12.0) == ["a"]


def test_a_key_with_a_rest_that_lives_for_ever_after_its_next_use() -> None:
    policy: Ttl[str] = Ttl(Lru())
    policy.add("ab", 0.0, Hint(left_s=3.0))
    policy.touch("a", 1.0)

    assert policy.expired(1e12) == ["b"]


def test_a_key_with_a_rest_that_was_discarded_and_came_back(policy: Ttl[str]) -> None:
    policy.add("a", 0.0, Hint(left_s=3.0))
    policy.discard("a")
    policy.add("a", 0.0, Hint(left_s=3.0))

    assert policy.expired(5.0) == ["a"]


def test_a_clock_that_is_set_back_leaves_no_key_more_time_than_its_rest(policy: Ttl[str]) -> None:
    policy.add("a", 100.0, Hint(left_s=3.0))
    policy.touch("", 50.0)

    assert policy.expired(52.9) == []
    assert policy.expired(53.0) == ["a"]


def test_many_ttls_at_once() -> None:
    policy: Ttl[int] = Ttl(Lru())
    for number in range(1000):
        policy.add([number], 0.0, Hint(ttl_s=1.0 + (number * 7) % 1000))
    policy.touch(range(0, 1000, 2), 0.5)

    expired = policy.expired(500.0)

    # Key k has deadline 1 + 7k mod 1000, half a second more if it is even.
    assert sorted(expired) == [k for k in range(1000) if 1 + k * 7 % 1000 + (0 if k % 2 else 0.5) <= 500.0]
    deadlines = [1 + k * 7 % 1000 + (0 if k % 2 else 0.5) for k in expired]
    assert deadlines == sorted(deadlines)


@pytest.mark.parametrize("ttl_s", [-1.0, nan])
def test_a_ttl_below_zero_is_refused(ttl_s: float) -> None:
    with pytest.raises(ValueError, match=f"ttl_s is {ttl_s}; it must be at least 0 seconds"):
        Ttl(Lru(), ttl_s)


def test_a_hint_that_is_no_number_is_refused_and_nothing_is_added(policy: Ttl[str]) -> None:
    with pytest.raises(ValueError, match="ttl_s is nan"):
        policy.add("a", 0.0, Hint(ttl_s=nan))
    with pytest.raises(ValueError, match="left_s is nan"):
        policy.add("a", 0.0, Hint(left_s=nan))

    assert len(policy) == 0


def test_a_policy_knows_that_no_key_has_a_deadline() -> None:
    policy = Ttl(Lru[str]())
    policy.add(["a"], 0.0)
    assert not policy.has_deadlines

    policy.add(["b"], 0.0, Hint(ttl_s=5.0))
    assert policy.has_deadlines
    policy.discard(["b"])
    assert policy.expired(6.0) == []  # when that is looked at next
    assert not policy.has_deadlines

    policy.add(["c"], 6.0, Hint(left_s=1.0))
    assert policy.has_deadlines
    assert policy.expired(8.0) == ["c"]
    assert policy.has_deadlines  # it is still there
    policy.discard(["c"])
    assert policy.expired(8.0) == []
    assert not policy.has_deadlines


def test_a_key_whose_time_is_shortened_has_its_own_again_from_its_next_use_on(policy: Ttl[str]) -> None:
    policy.add("ab", 0.0)

    policy.shorten("ab", 1.0, 2.0)
    policy.touch("b", 2.0)

    assert policy.expired(3.0) == ["a"]
    assert policy.expired(11.9) == ["a"]
    assert policy.expired(12.0) == ["a", "b"]


def test_no_key_lives_longer_because_its_time_is_shortened(policy: Ttl[str]) -> None:
    policy.add("a", 0.0)

    policy.shorten("ab", 5.0, 60.0)

    assert policy.expired(10.0) == ["a"]
    assert "b" not in policy


def test_shortening_is_no_use() -> None:
    policy: Ttl[str] = Ttl(Lru())
    policy.add("ab", 0.0)

    policy.shorten("a", 1.0, 60.0)

    assert policy.victims(1) == ["a"]


def test_a_key_that_is_shortened_again_and_again_is_remembered_once(policy: Ttl[str]) -> None:
    policy.add("a", 0.0)

    for second in range(10_000):
        policy.touch("a", second)
        policy.shorten("a", second, 5.0)

    assert len(policy._lent_due) < 2000
    assert policy.expired(10_003.9) == []
    assert policy.expired(10_004.0) == ["a"]


class Miser(Lru[str]):
    """It finds no newcomer worth what it would push out."""

    def worth(self, keys: Sequence[str], now: float) -> list[float]:
        return [1.0] * len(keys)

    def num_worthy(
        self, request_id: int, keys: Sequence[str], victims: Sequence[str], now: float, priority: int = 0
    ) -> int:
        return max(len(keys) - len(victims), 0)


def test_what_has_expired_is_worth_nothing_whatever_the_policy_says() -> None:
    policy: Ttl[str] = Ttl(Miser(), ttl_s=10.0)
    policy.add(["old"], 0.0)
    policy.add(["young"], 9.0)
    policy.expired(15.0)

    assert policy.victims(2) == ["old", "young"]
    assert policy.num_worthy(1, ["a", "b"], policy.victims(2), 15.0) == 1


def test_a_policy_without_forecasts_takes_all() -> None:
    policy: Ttl[str] = Ttl(Lru())

    assert not policy.forecasts
    assert policy.num_worthy(1, ["a", "b"], ["c"], 0.0) == 2
