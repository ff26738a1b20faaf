from __future__ import annotations

import pytest

from eviction.policy import EvictionPolicy, Hint
from eviction.s3fifo import S3Fifo
from kvstore.testing.contracts.policy import EvictionPolicyContract


class TestS3Fifo(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return S3Fifo()


def evict(policy: S3Fifo[str], n: int) -> list[str]:
    victims = policy.victims(n)
    policy.discard(victims)
    return victims


def add_scan(policy: S3Fifo[str], name: str, num: int, room: int) -> None:
    """Add keys that are never used, evicting as a tier with `room` slots does."""
    for i in range(num):
        policy.add([f"{name}{i}"], 0.0)
        evict(policy, max(len(policy) - room, 0))


def test_one_use_is_not_enough_to_pass_the_trial() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("abc", 0.0)
    policy.touch("a", 1.0)

    assert evict(policy, 3) == ["a", "b", "c"]


def test_two_uses_pass_the_trial() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("abc", 0.0)
    policy.touch("a", 1.0)
    policy.touch("a", 2.0)

    assert evict(policy, 3) == ["b", "c", "a"]


def test_in_main_a_used_key_goes_round_once_for_each_use() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("a", 0.0, Hint(hits=3))
    policy.add("b", 0.0, Hint(hits=1))
    policy.add("c", 0.0, Hint(hits=2))

    assert evict(policy, 3) == ["b", "c", "a"]


def test_many_old_uses_count_no_more_than_three() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("a", 0.0, Hint(hits=1000))
    policy.add("b", 0.0, Hint(hits=1))
    for now in range(3):
        policy.touch("b", now)

    assert evict(policy, 2) == ["a", "b"]


def test_a_key_thrown_out_and_added_again_survives_a_scan() -> None:
    policy: S3Fifo[str] = S3Fifo()
    add_scan(policy, "filler", 50, room=50)
    policy.add(["twice"], 0.0)
    policy.add(["once"], 0.0)
    evict(policy, 52)

    policy.add(["twice"], 1.0)
    add_scan(policy, "scan", 200, room=50)

    assert "twice" in policy
    assert "once" not in policy


def test_a_key_pinned_and_deleted_is_not_remembered_as_thrown_out() -> None:
    policy: S3Fifo[str] = S3Fifo()
    add_scan(policy, "filler", 50, room=50)
    policy.add(["taken"], 0.0)
    policy.discard(["taken"])

    policy.add(["taken"], 1.0)
    add_scan(policy, "scan", 200, room=50)

    assert "taken" not in policy


def test_the_memory_of_what_was_thrown_out_is_bounded() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add(["first"], 0.0)
    add_scan(policy, "scan", 500, room=20)

    policy.add(["first"], 1.0)  # forgotten long ago: on trial again
    add_scan(policy, "more", 100, room=20)

    assert "first" not in policy


def test_a_condemned_key_that_is_used_goes_to_main() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("abc", 0.0)
    assert policy.victims(2) == ["a", "b"]

    policy.touch("a", 1.0)

    assert policy.victims(3) == ["b", "c", "a"]


@pytest.mark.parametrize("hits", [1, 5])
def test_a_scan_does_not_disturb_what_came_back_from_a_pin(hits: int) -> None:
    policy: S3Fifo[str] = S3Fifo()
    hot = [f"hot{i}" for i in range(20)]
    policy.add(hot, 0.0)
    policy.discard(hot)
    policy.add(hot, 1.0, Hint(hits=hits))

    add_scan(policy, "scan", 1000, room=40)

    assert all(key in policy for key in hot)


def test_holding_a_key_keeps_its_uses() -> None:
    policy: S3Fifo[str] = S3Fifo()
    policy.add("abc", 0.0)
    for _ in range(2):
        policy.hold("a")
        policy.release("a", 1.0)
        policy.touch("a", 1.0)

    assert evict(policy, 3) == ["b", "c", "a"]


def test_a_key_that_comes_back_as_another_object_is_known_by_its_name() -> None:
    policy: S3Fifo[tuple[str, int]] = S3Fifo()
    policy.name_by(lambda key: key[0])
    policy.add([("filler", i) for i in range(20)], 0.0)
    policy.add([("again", 1)], 0.0)
    policy.discard(policy.victims(21))

    policy.add([("again", 2)], 1.0)
    for i in range(100):
        policy.add([(f"scan{i}", 0)], 2.0)
        policy.discard(policy.victims(max(len(policy) - 20, 0)))

    assert ("again", 2) in policy
