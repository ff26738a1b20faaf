"""The breakers of a lane: what is refused in one direction says nothing about the others."""

from __future__ import annotations

import pytest

from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.move.breaker import Breaker
from kvstore.move.directions import DIRECTION_OF, Directions
from kvstore.plan.records import Op
from tests.kvstore.move.conftest import FakeClock


@pytest.fixture
def directions(clock: FakeClock) -> Directions:
    return Directions(Breaker(failures_to_open=3, probe_after_s=1.0, probe_max_s=4.0, now=clock))


def refuse(directions: Directions, op: Op, times: int) -> None:
    for _ in range(times):
        directions.refused(op, "READONLY")


@pytest.mark.parametrize("op", list(Op))
def test_what_is_refused_three_times_in_a_row_takes_out_its_own_direction_alone(directions: Directions, op: Op) -> None:
    refuse(directions, op, 3)

    assert directions.open_ways == ALL_DIRECTIONS - {DIRECTION_OF[op]}
    assert directions.whole.allow()
    assert directions.num_opened == 1
    assert directions.reasons == {DIRECTION_OF[op]: "READONLY"}


def test_answers_in_another_direction_do_not_excuse_refusals(directions: Directions) -> None:
    for _ in range(3):
        directions.refused(Op.SPILL, "READONLY")
        directions.answered(Op.FETCH)

    assert not directions.allows(Op.SPILL)
    assert directions.allows(Op.FETCH)


def test_answered_lookups_do_not_excuse_loads_that_are_refused(directions: Directions) -> None:
    for _ in range(3):
        directions.answered(Op.PROBE)
        directions.refused(Op.FETCH, "NOPERM")

    assert not directions.allows(Op.PROBE)  # what cannot be fetched need not be found
    assert directions.allows(Op.SPILL)


def test_an_answer_to_the_same_operation_starts_the_count_again(directions: Directions) -> None:
    for _ in range(4):
        refuse(directions, Op.SPILL, 2)
        directions.answered(Op.SPILL)

    assert directions.open_ways == ALL_DIRECTIONS


def test_no_answer_three_times_in_a_row_takes_out_everything(directions: Directions) -> None:
    for op in (Op.SPILL, Op.FETCH, Op.PROBE):
        directions.unanswered(op, "no answer in time")

    assert directions.open_ways == frozenset()
    assert not directions.whole.allow()
    assert directions.due(now=100.0) == []  # the ping comes first


def test_writes_that_are_never_answered_while_reads_are_take_out_writes(directions: Directions) -> None:
    for _ in range(3):
        directions.unanswered(Op.SPILL, "no answer in time")
        directions.answered(Op.FETCH)

    assert directions.open_ways == ALL_DIRECTIONS - {Direction.WRITE}


def test_a_refusal_is_an_answer_of_the_tier(directions: Directions) -> None:
    for _ in range(2):
        directions.unanswered(Op.FETCH, "no answer in time")
        directions.unanswered(Op.PROBE, "no answer in time")
        directions.refused(Op.SPILL, "READONLY")

    assert directions.whole.allow()


def test_a_direction_is_tested_after_its_own_back_off(directions: Directions, clock: FakeClock) -> None:
    refuse(directions, Op.SPILL, 3)
    clock.advance(0.5)
    refuse(directions, Op.DELETE, 3)

    assert directions.due(clock() + 0.4) == []
    assert directions.due(clock() + 0.5) == [Direction.WRITE]
    assert set(directions.due(clock() + 1.0)) == {Direction.WRITE, Direction.DELETE}


def test_a_test_that_is_done_lets_the_direction_back_in_and_forgets_why_it_was_out(
    directions: Directions, clock: FakeClock
) -> None:
    refuse(directions, Op.SPILL, 3)
    clock.advance(1.0)
    directions.breakers[Direction.WRITE].probe()

    directions.probed(Direction.WRITE, None)

    assert directions.open_ways == ALL_DIRECTIONS
    assert directions.reasons == {}


def test_work_that_fails_again_after_a_good_test_opens_at_once_and_for_longer(
    directions: Directions, clock: FakeClock
) -> None:
    breaker = directions.breakers[Direction.WRITE]
    refuse(directions, Op.SPILL, 3)
    waits = []
    for _ in range(4):
        waits.append(breaker.probe_in_s(clock()))
        clock.advance(waits[-1])
        breaker.probe()
        directions.probed(Direction.WRITE, None)
        refuse(directions, Op.SPILL, 1)

    assert waits == [1.0, 2.0, 4.0, 4.0]

    clock.advance(4.0)
    breaker.probe()
    directions.probed(Direction.WRITE, None)
    directions.answered(Op.SPILL)
    refuse(directions, Op.SPILL, 2)
    assert directions.allows(Op.SPILL)
    refuse(directions, Op.SPILL, 1)
    assert breaker.probe_in_s(clock()) == 1.0


def test_answers_that_come_late_change_nothing_while_a_direction_is_out(directions: Directions) -> None:
    refuse(directions, Op.SPILL, 3)

    directions.answered(Op.SPILL)
    refuse(directions, Op.SPILL, 3)

    assert directions.num_opened == 1
    assert not directions.allows(Op.SPILL)
