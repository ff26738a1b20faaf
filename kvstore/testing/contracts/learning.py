"""The promises of a policy that listens to requests or learns from them, a part of the suite of every policy.

A policy that does neither passes by.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from eviction.policy import BELIEF_SPANS_S, Ending, EvictionPolicy, PromptUse
from eviction.ttl import Ttl


class LearningContract:
    """Inherited by `EvictionPolicyContract`."""

    def new_policy(self) -> EvictionPolicy[str]:
        raise NotImplementedError

    def new_whole(self) -> Ttl[str]:
        """One as the planner has it: what a policy lacks of `PolicyListener` is made up for."""
        return Ttl(self.new_policy())

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
