from __future__ import annotations

from eviction.policy import EvictionPolicy
from eviction.sieve import Sieve
from kvstore.testing.contracts.policy import EvictionPolicyContract


class TestSieve(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Sieve()


def evict(policy: Sieve[str], n: int) -> list[str]:
    victims = policy.victims(n)
    policy.discard(victims)
    return victims


def test_the_hand_clears_a_bit_and_leaves_the_key_in_its_place() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abcd", 0.0)
    policy.touch("ac", 1.0)

    assert evict(policy, 1) == ["b"]  # the hand has passed a and cleared it
    assert evict(policy, 1) == ["d"]  # and c
    assert evict(policy, 2) == ["a", "c"]  # from the oldest again


def test_what_was_added_while_the_hand_is_under_way_is_met_before_it_starts_again() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abc", 0.0)
    policy.touch("a", 1.0)
    assert evict(policy, 1) == ["b"]

    policy.add("d", 2.0)

    assert evict(policy, 3) == ["c", "d", "a"]


def test_what_was_added_after_the_hand_passed_the_newest_is_met_last() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abc", 0.0)
    policy.touch("ab", 1.0)
    assert evict(policy, 1) == ["c"]

    policy.add("d", 2.0)

    assert evict(policy, 3) == ["a", "b", "d"]


def test_a_condemned_key_that_is_used_comes_back_behind_the_hand() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abc", 0.0)
    assert policy.victims(2) == ["a", "b"]

    policy.touch("a", 1.0)

    assert policy.victims(3) == ["b", "c", "a"]


def test_a_scan_does_not_disturb_what_is_used() -> None:
    policy: Sieve[str] = Sieve()
    hot = [f"hot{i}" for i in range(20)]
    policy.add(hot, 0.0)

    for i in range(1000):
        policy.touch(hot, i)
        policy.add([f"scan{i}"], i)
        if len(policy) > 40:
            evict(policy, 1)

    assert all(key in policy for key in hot)


def test_a_held_key_that_the_hand_passes_keeps_its_place() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abc", 0.0)
    policy.hold("a")
    assert evict(policy, 1) == ["b"]

    policy.release("a", 1.0)

    assert evict(policy, 2) == ["c", "a"]  # the oldest, but the hand is past it


def test_a_release_and_a_renewal_set_no_bit_and_move_nothing() -> None:
    policy: Sieve[str] = Sieve()
    policy.add("abc", 0.0)
    policy.hold("a")
    policy.release("a", 1.0)
    policy.renew("b", 1.0)

    assert evict(policy, 3) == ["a", "b", "c"]
