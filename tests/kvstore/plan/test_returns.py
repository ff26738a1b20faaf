"""The table of returns: chances by age, by class, and of sessions that are still away."""

from __future__ import annotations

import pytest

from kvstore.plan.returns import EDGES_S, MAX_REASONS, NUM_BUCKETS, ReturnTable, bucket_of


def learn(table: ReturnTable, reason: str, gap_s: float | None, times: int = 1) -> None:
    """Sessions that returned after `gap_s`; None: that never did."""
    leaving = table.leaving(reason, None)
    last = NUM_BUCKETS - 1 if gap_s is None else bucket_of(gap_s)
    for _ in range(times):
        table.stayed(leaving, 0, last + 1)
        if gap_s is not None:
            table.returned(leaving, last)


def test_a_table_that_knows_nothing_gives_no_chance() -> None:
    table = ReturnTable()

    assert table.chance(table.leaving("stop", 1.0), 0.0, 0.0, 1e9) == 0.0


def test_a_return_at_one_age_is_likely_before_it_and_not_after() -> None:
    table = ReturnTable()
    learn(table, "stop", 100.0, 500)
    leaving = table.leaving("stop", None)

    assert table.chance(leaving, 50.0, 50.0, 200.0) > 0.8
    assert table.chance(leaving, 200.0, 200.0, 1000.0) < 0.2


def test_sessions_that_stay_away_lower_the_chance() -> None:
    table = ReturnTable()
    learn(table, "stop", 100.0, 500)
    learn(table, "stop", None, 500)

    assert table.chance(table.leaving("stop", None), 0.0, 0.0, 1000.0) == pytest.approx(0.5, abs=0.05)


def test_a_rare_class_leans_on_the_wider_one() -> None:
    table = ReturnTable()
    learn(table, "stop", 100.0, 500)

    assert table.chance(table.leaving("rare", None), 50.0, 50.0, 200.0) > 0.8


def test_classes_part_by_reason() -> None:
    table = ReturnTable()
    learn(table, "tool_use", 2.0, 500)
    learn(table, "end_turn", None, 500)

    assert table.chance(table.leaving("tool_use", None), 0.0, 0.0, 4.0) > 0.8
    assert table.chance(table.leaving("end_turn", None), 0.0, 0.0, 4.0) < 0.1


def test_words_of_callers_are_bounded() -> None:
    table = ReturnTable()

    classes = {table.leaving(f"word {number}", None) for number in range(1000)}

    assert len(classes) <= MAX_REASONS + 1


def test_every_age_has_a_bucket() -> None:
    assert [bucket_of(age) for age in (0.0, EDGES_S[1], 1e12)] == [0, 1, NUM_BUCKETS - 1]
