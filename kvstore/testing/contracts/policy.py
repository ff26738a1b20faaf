"""The promises of every eviction policy (eviction/policy.py), as a suite to inherit.

A subclass supplies `new_policy`, which returns an empty policy without a ttl of its own.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eviction.policy import BELIEF_SPANS_S, Ending, EvictionPolicy, Hint, PromptUse
from eviction.ttl import Ttl

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


class EvictionPolicyContract:
    """Inherit and override `new_policy`."""

    def new_policy(self) -> EvictionPolicy[str]:
        raise NotImplementedError

    @pytest.fixture
    def policy(self) -> EvictionPolicy[str]:
        return self.new_policy()

    def new_whole(self) -> Ttl[str]:
        """One as the planner has it: what a policy lacks of `PolicyListener` is made up for."""
        return Ttl(self.new_policy())

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

    # Learning. A policy that does not learn passes by.

    def test_what_was_learned_goes_to_another_process_and_back(self) -> None:
        policy, fresh = self.new_whole(), self.new_whole()
        _teach(policy)
        if policy.learner is None or fresh.learner is None:
            return

        fresh.add(["a"], 0.0)
        fresh.learner.restore(_from_json(policy.learner.tables()))

        assert _from_json(fresh.learner.tables()) == _from_json(policy.learner.tables())
        assert fresh.members() == ["a"]

    def test_tables_do_not_change_after_they_were_given(self) -> None:
        policy = self.new_whole()
        _teach(policy)
        if policy.learner is None:
            return
        tables = policy.learner.tables()
        before = _from_json(tables)

        _teach(policy, 1000)

        assert _from_json(tables) == before

    def test_what_are_no_tables_is_refused_and_changes_nothing(self) -> None:
        policy = self.new_whole()
        _teach(policy)
        if policy.learner is None:
            return
        before = _from_json(policy.learner.tables())

        for none in ({}, {"version": -1}, {**before, "version": None}, dict.fromkeys(before)):
            with pytest.raises(ValueError):  # noqa: PT011 - the words are the policy's
                policy.learner.restore(none)
            with pytest.raises(ValueError):  # noqa: PT011
                policy.learner.beliefs(none)

        assert _from_json(policy.learner.tables()) == before

    def test_beliefs_are_of_the_tables_and_of_nothing_else(self) -> None:
        policy, other = self.new_whole(), self.new_whole()
        _teach(policy)
        if policy.learner is None or other.learner is None:
            return
        tables = _from_json(policy.learner.tables())

        beliefs = other.learner.beliefs(tables)

        assert beliefs == policy.learner.beliefs(policy.learner.tables())
        known = {one.words for one in beliefs}
        assert len(known) == len(beliefs) > 0
        for one in beliefs:
            assert one.seen > 0
            assert len(one.within) == len(BELIEF_SPANS_S)
            assert 0.0 <= one.within[0] <= one.within[1] <= one.within[2] <= 1.0
            assert one.mean_s is None or 0.0 <= one.mean_s <= BELIEF_SPANS_S[-1]
            assert not one.words or one.words[:-1] in known, "a class is a part of another"

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


def _teach(policy: Ttl[str], first: int = 0) -> None:
    """Sessions of two turns, in two manners."""
    for i in range(first, first + 100):
        path = [f"{i}.{depth}" for depth in range(3)]
        for turn, (gap_s, reason) in enumerate(((0.0, "tool_calls"), (30.0, "stop"))):
            now = 100.0 * i + gap_s
            policy.used(PromptUse(2 * i + turn, path, f"session {i}"), now)
            policy.add(reversed(path), now)
            policy.ended(2 * i + turn, Ending(reason, None, 50 * turn), now + 1.0)
        policy.discard(policy.victims(max(0, len(policy) - 30)))


def _from_json(tables: dict[str, Any]) -> dict[str, Any]:
    """Tables as a file gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(tables, allow_nan=False, default=lambda array: array.tolist()))
    return found
