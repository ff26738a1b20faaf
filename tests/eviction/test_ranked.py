from __future__ import annotations

from eviction.lru import Recency
from eviction.policy import Hint
from eviction.ranked import Ranked, all_new


def test_priorities_that_came_and_went_leave_nothing_behind() -> None:
    policy: Ranked[str] = Ranked(Recency)
    policy.add(["stays"], 0.0, Hint(priority=7))

    for priority in range(100, 200):
        policy.add(["a", "b"], 0.0, Hint(priority=priority))
        policy.demote(["b"])
        policy.discard(["a", "b"])

    # Every call visits each order, so one that is kept for nothing costs on every call.
    assert sorted(policy._orders) == [0, 7]


def test_a_key_that_changes_its_priority_again_and_again_is_in_one_order() -> None:
    policy: Ranked[str] = Ranked(Recency)

    for priority in (3, -1, 0, 3, 5):
        policy.add(["a"], 0.0, Hint(priority=priority))

        assert len(policy) == 1
        assert policy.victims(3) == ["a"]


def test_all_new_looks_into_every_queue() -> None:
    assert all_new(["a", "b"], {"c": 1}, {})
    assert not all_new(["a", "b"], {"c": 1}, {"b": 1})
    assert all_new([], {"a": 1})
