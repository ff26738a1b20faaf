"""What is learned of how long blocks of a kind wait for their next use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eviction.survival import (
    EDGES,
    MAX_CLASSES,
    MAX_DEPTH,
    NUM_AGES,
    ONE_OBSERVATION,
    Survival,
    age_of,
    counts_of,
    tables_of,
)

MINUTE = age_of(60.0)


def learned(survival: Survival, features: tuple[int, ...], num: int, *, used_at: int | None) -> int:
    """Show `num` blocks of a class: all used at an age, or waiting for ever for None."""
    number = survival.class_of(features)
    last = NUM_AGES if used_at is None else used_at + 1
    for age in range(last):
        survival.count(number, age, num * ONE_OBSERVATION * (age == used_at), num * ONE_OBSERVATION)
    for _ in range(MAX_CLASSES // 32):
        survival.update()
    return number


def test_ages_are_the_intervals_between_edges() -> None:
    for age in (0, 1, 17, NUM_AGES - 1):
        assert age_of(float(EDGES[age])) == age
    assert age_of(1e12) == NUM_AGES - 1
    assert age_of(-1.0) == 0  # a clock that was set back


def test_with_nothing_learned_what_was_used_last_is_worth_most() -> None:
    worth = Survival().worth[0]
    assert (np.diff(worth) <= 0).all()
    assert (worth > 0).all()


def test_blocks_of_a_kind_that_comes_back_are_worth_more_until_they_should_have_come() -> None:
    survival = Survival()
    back = learned(survival, (1,), 100_000, used_at=MINUTE)
    gone = learned(survival, (2,), 100_000, used_at=None)
    assert survival.worth[back, 0] > 10 * survival.worth[gone, 0]
    assert survival.worth[back, MINUTE] > survival.worth[back, 0], "the use is near"
    assert survival.worth[gone, MINUTE] < survival.worth[back, MINUTE]


def test_a_class_of_which_little_was_seen_leans_on_its_parent() -> None:
    survival = Survival()
    parent = learned(survival, (1,), 100_000, used_at=MINUTE)
    child = learned(survival, (1, 7), 1, used_at=None)
    assert survival.worth[child, :MINUTE] == pytest.approx(survival.worth[parent, :MINUTE], rel=0.05)


def test_a_class_counts_for_all_above_it() -> None:
    survival = Survival()
    learned(survival, (1, 2, 3), 50, used_at=MINUTE)
    for features in ((), (1,), (1, 2), (1, 2, 3)):
        seen, _ = survival.summary(features)
        assert seen == 50


def test_the_summary_says_which_share_is_used_again_by_an_age() -> None:
    survival = Survival()
    learned(survival, (1,), 1_000_000, used_at=MINUTE)
    _, shares = survival.summary((1,))
    assert shares[MINUTE - 1] < 0.01
    assert shares[MINUTE] == pytest.approx(0.98, abs=0.01)


def test_when_there_are_too_many_classes_new_ones_count_with_their_parent() -> None:
    survival = Survival()
    numbers = {survival.class_of((1, feature)) for feature in range(2 * MAX_CLASSES)}
    assert len(numbers) <= MAX_CLASSES
    assert survival.class_of((1, 3 * MAX_CLASSES)) == survival.class_of((1,))


def test_tables_are_restored() -> None:
    survival, other = Survival(), Survival()
    learned(survival, (1, 2), 1000, used_at=MINUTE)
    learned(survival, (3,), 1000, used_at=None)
    other.restore(*counts_of(tables_of(survival.counts())))
    assert other.counts() == survival.counts()
    num = len(survival.counts()[0])
    assert np.array_equal(other.worth[:num], survival.worth[:num])


ZEROS = [[0.0] * NUM_AGES]


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"version": 99},
        {"version": 2, "classes": [[]], "events": [], "at_risk": []},
        {"version": 2, "classes": [[]], "events": [[-1.0] * NUM_AGES], "at_risk": ZEROS},
        {"version": 2, "classes": [[]], "events": [[float("nan")] * NUM_AGES], "at_risk": ZEROS},
        {"version": 2, "classes": [[]], "events": [[1e300] * NUM_AGES], "at_risk": ZEROS},
        {"version": 2, "classes": ["x"], "events": ZEROS, "at_risk": ZEROS},
        {"version": 2, "classes": [[1] * (MAX_DEPTH + 1)], "events": ZEROS, "at_risk": ZEROS},
        {"version": 2, "classes": [[1 << 40]], "events": ZEROS, "at_risk": ZEROS},
        {"version": 2, "classes": 5, "events": 5, "at_risk": 5},
    ],
)
def test_tables_that_are_none_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ
        counts_of(broken)
