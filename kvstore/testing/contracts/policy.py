"""The promises of every eviction policy (eviction/policy.py), as a suite to inherit.

A subclass supplies `new_policy`, which returns an empty policy without a ttl of its own.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eviction.policy import Ending, EvictionPolicy, Hint, PromptUse
from eviction.ttl import Ttl
from kvstore.testing.contracts.learning import LearningContract

Keys = list[str]

# One step of a history: what is done, and to which keys.
steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "used", "urgent", "touch", "demote", "discard", "evict", "hold", "release"]),
        st.lists(st.sampled_from("abcdefgh"), max_size=5, unique=True),
    ),
    max_size=25,
)
# The same method runs for each inheriting class; without a database no example of one is replayed against another.
inherited = settings(max_examples=40, database=None, suppress_health_check=[HealthCheck.differing_executors])
HINTS = {"add": Hint(), "used": Hint(hits=2), "urgent": Hint(priority=1)}


class EvictionPolicyContract(LearningContract):
    """Inherit and override `new_policy`."""

    @pytest.fixture
    def policy(self) -> EvictionPolicy[str]:
        return self.new_policy()

    def play(self, policy: Ttl[str], step: str, keys: Keys) -> None:
        """One step at time 0."""
        if step in HINTS:
            policy.add(keys, 0.0, HINTS[step])
        elif step == "touch":
            policy.touch(keys, 0.0)
        elif step == "demote":
            policy.demote(keys)
        elif step == "hold":
            policy.hold(keys)
        elif step == "release":
            policy.release(keys, 0.0, Hint(hits=1))
        elif step == "discard":
            policy.discard(keys)
        else:
            policy.discard(policy.victims(len(keys)))

    # Membership.

    def test_a_new_policy_holds_nothing(self, policy: EvictionPolicy[str]) -> None:
        assert len(policy) == 0
        assert policy.victims(5) == []
        assert policy.expired(1e9) == []
        assert "a" not in policy

    def test_added_keys_are_members_until_discarded(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b", "c"], 0.0)
        policy.discard(["b"])

        assert ["a" in policy, "b" in policy, "c" in policy] == [True, False, True]
        assert len(policy) == 2
        assert sorted(policy.victims(5)) == ["a", "c"]

    def test_a_key_added_twice_counts_once(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0)
        policy.add(["a"], 1.0)

        assert len(policy) == 2
        assert sorted(policy.victims(5)) == ["a", "b"]

    def test_unknown_keys_are_ignored(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a"], 0.0)

        policy.touch(["x"], 1.0)
        policy.demote(["x"])
        policy.discard(["x"])

        assert len(policy) == 1
        assert "x" not in policy
        assert policy.victims(5) == ["a"]

    def test_keys_may_come_from_an_iterator(self, policy: EvictionPolicy[str]) -> None:
        policy.add(iter(["a", "b", "c"]), 0.0)
        policy.add((key for key in "d"), 0.0, Hint(priority=1))
        policy.touch(reversed(["a", "b"]), 1.0)
        policy.demote(iter(["d"]))
        policy.discard(key for key in ("a",))

        assert sorted(policy.victims(5)) == ["b", "c", "d"]

    def test_a_discarded_key_may_come_back(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a"], 0.0)
        policy.discard(["a"])
        policy.add(["a"], 1.0, Hint(hits=3))

        assert len(policy) == 1
        assert policy.victims(5) == ["a"]

    @inherited
    @given(history=steps)
    def test_membership_is_what_was_added_and_not_discarded(self, history: list[tuple[str, Keys]]) -> None:
        policy = self.new_whole()
        members: set[str] = set()

        for step, keys in history:
            if step in HINTS or step == "release":
                members |= set(keys)
            elif step in ("discard", "hold"):
                members -= set(keys)
            elif step == "evict":
                members -= set(policy.victims(len(keys)))
            self.play(policy, step, keys)

            assert len(policy) == len(members)
            assert {key for key in "abcdefgh" if key in policy} == members
        assert sorted(policy.victims(99)) == sorted(members)

    # Victims.

    @inherited
    @given(history=steps, n=st.integers(0, 10))
    def test_asking_for_victims_changes_no_membership_and_asking_again_gives_the_same(
        self, history: list[tuple[str, Keys]], n: int
    ) -> None:
        policy = self.new_whole()
        for step, keys in history:
            self.play(policy, step, keys)
        before = len(policy)

        first = policy.victims(n)

        assert len(first) == len(set(first)) == min(n, before)
        assert policy.victims(n) == first
        assert policy.victims(n - 1) == first[: max(n - 1, 0)]
        assert policy.victims(n + 3)[:n] == first
        assert len(policy) == before
        assert all(key in policy for key in first)

    @inherited
    @given(history=steps)
    def test_a_batch_is_the_same_as_its_keys_one_by_one(self, history: list[tuple[str, Keys]]) -> None:
        batched, single = self.new_whole(), self.new_whole()

        for step, keys in history:
            if step == "evict":
                assert batched.victims(len(keys)) == single.victims(len(keys))
            self.play(batched, step, keys)
            # "The first of them first" makes demotion of a batch the reverse of demotions one by one.
            for key in reversed(keys) if step == "demote" else keys:
                self.play(single, step, [key])

        assert batched.victims(99) == single.victims(99)

    def test_a_path_added_tail_first_leaves_leaf_first(self, policy: EvictionPolicy[str]) -> None:
        policy.add(reversed(["root", "middle", "leaf"]), 0.0)

        assert policy.victims(3) == ["leaf", "middle", "root"]

    def test_a_key_used_twice_outlives_one_added_with_it(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0)
        policy.touch(["a"], 1.0)
        policy.touch(["a"], 2.0)

        assert policy.victims(1) == ["b"]

    def test_a_key_back_from_a_pin_outlives_one_never_used(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["pinned", "idle"], 0.0)
        policy.discard(["pinned"])
        policy.add(["pinned"], 1.0, Hint(hits=1))

        assert policy.victims(1) == ["idle"]

    # Holding.

    def test_a_held_key_is_no_victim_until_it_is_released(self) -> None:
        policy = self.new_whole()
        policy.add(["a", "b", "c"], 0.0)

        policy.hold(["a", "x"])

        assert "a" not in policy
        assert len(policy) == 2
        assert sorted(policy.members()) == ["b", "c"]
        assert policy.victims(3) == ["b", "c"]
        policy.release(["a"], 1.0, Hint(hits=1))
        assert sorted(policy.victims(9)) == ["a", "b", "c"]

    def test_a_condemned_key_that_is_held_is_no_victim(self) -> None:
        policy = self.new_whole()
        policy.add(["a", "b", "c"], 0.0)
        first = policy.victims(1)

        policy.hold(first)

        assert first[0] not in policy.victims(3)
        assert len(policy.victims(3)) == 2

    def test_with_all_keys_held_there_is_no_victim(self) -> None:
        policy = self.new_whole()
        policy.add(["a", "b"], 0.0)
        policy.touch(["a"], 0.0)

        policy.hold(["a", "b"])

        assert policy.victims(2) == []

    def test_a_held_key_that_is_discarded_is_forgotten(self) -> None:
        policy = self.new_whole()
        policy.add(["a"], 0.0)
        policy.hold(["a"])
        policy.discard(["a"])

        assert policy.members() == []
        policy.release(["a"], 1.0)
        assert policy.members() == ["a"]

    def test_a_key_held_and_used_outlives_one_never_used(self) -> None:
        policy = self.new_whole()
        policy.add(["held", "idle"], 0.0)
        for now in (1.0, 2.0):
            policy.hold(["held"])
            policy.release(["held"], now)
            policy.touch(["held"], now)

        assert policy.victims(1) == ["idle"]

    def test_renewed_keys_are_members_as_before(self) -> None:
        policy = self.new_whole()
        policy.add(["a", "b"], 0.0)

        policy.renew(["a", "x"], 1.0)

        assert sorted(policy.members()) == ["a", "b"]

    def test_being_told_of_requests_changes_no_membership(self) -> None:
        policy = self.new_whole()
        policy.add(["a", "b"], 0.0)

        policy.used(PromptUse(1, ["a", "b", "never seen"], "session", last_turn=False), 1.0)
        policy.ended(1, Ending("stop"), 2.0)
        policy.ended(2, Ending(), 2.0)

        assert sorted(policy.members()) == ["a", "b"]

    # Demotion.

    def test_demoted_keys_are_the_next_victims_in_the_order_given(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b", "c", "d"], 0.0)
        policy.touch(["c", "d"], 1.0)
        policy.demote(["d", "c"])

        assert policy.victims(2) == ["d", "c"]

    def test_the_latest_demotion_comes_first(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b", "c", "d"], 0.0)
        policy.demote(["b", "c"])
        policy.demote(["d", "c"])

        assert policy.victims(3) == ["d", "c", "b"]

    def test_a_demoted_key_that_is_used_is_no_longer_demoted(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0)
        policy.demote(["b"])
        policy.touch(["b"], 1.0)

        assert policy.victims(2) == ["a", "b"]

    def test_a_demoted_key_that_is_added_again_is_no_longer_demoted(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0)
        policy.demote(["b"])
        policy.add(["b"], 1.0, Hint(hits=1))

        assert len(policy) == 2
        assert policy.victims(2) == ["a", "b"]

    def test_a_demoted_key_can_be_discarded(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0)
        policy.demote(["b"])
        policy.discard(["b"])

        assert len(policy) == 1
        assert policy.victims(2) == ["a"]

    # Priority.

    def test_all_keys_of_a_lower_priority_leave_first(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["high"], 0.0, Hint(priority=5))
        policy.add(["usual"], 0.0)
        policy.add(["low"], 0.0, Hint(priority=-5))
        policy.touch(["low", "usual"], 1.0)
        policy.touch(["low"], 2.0)

        assert policy.victims(3) == ["low", "usual", "high"]

    def test_the_latest_hint_decides_the_priority(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a", "b"], 0.0, Hint(priority=1))
        policy.add(["a"], 1.0, Hint(priority=0))

        assert len(policy) == 2
        assert policy.victims(2) == ["a", "b"]

    def test_demotion_beats_priority(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a"], 0.0)
        policy.add(["urgent"], 0.0, Hint(priority=9))
        policy.demote(["urgent"])

        assert policy.victims(2) == ["urgent", "a"]

    def test_a_demoted_key_that_is_used_has_its_priority_back(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["urgent"], 0.0, Hint(priority=9))
        policy.add(["a"], 0.0)
        policy.demote(["urgent"])
        policy.touch(["urgent"], 1.0)
        policy.touch(["a"], 2.0)

        assert policy.victims(2) == ["a", "urgent"]

    def test_a_priority_is_forgotten_with_its_last_key(self, policy: EvictionPolicy[str]) -> None:
        policy.add(["a"], 0.0, Hint(priority=3))
        policy.discard(["a"])
        policy.add(["a", "b"], 1.0)
        policy.touch(["b"], 2.0)

        assert policy.victims(2) == ["a", "b"]
