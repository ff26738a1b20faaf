"""The circuit breaker, state by state, under a clock that moves only when told."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.move.breaker import Breaker, BreakerState
from kvstore.testing.pages import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


@pytest.fixture
def breaker(clock: FakeClock) -> Breaker:
    return Breaker(failures_to_open=3, probe_after_s=1.0, probe_max_s=4.0, now=clock)


def test_it_opens_after_so_many_failures_in_a_row(breaker: Breaker) -> None:
    breaker.failure()
    breaker.failure()
    assert breaker.allow()

    breaker.failure()

    assert not breaker.allow()
    assert breaker.num_opened == 1


def test_a_success_between_failures_starts_the_count_again(breaker: Breaker) -> None:
    for _ in range(5):
        breaker.failure()
        breaker.failure()
        breaker.success()

    assert breaker.allow()


def test_it_is_due_when_the_back_off_is_over_and_not_before(breaker: Breaker, clock: FakeClock) -> None:
    breaker.trip()

    assert not breaker.due(clock() + 0.99)
    assert breaker.probe_in_s(clock() + 0.75) == 0.25
    assert breaker.due(clock() + 1.0)


def test_while_a_ping_is_on_its_way_no_other_is_due_and_nothing_is_let_through(
    breaker: Breaker, clock: FakeClock
) -> None:
    breaker.trip()
    clock.advance(1.0)

    breaker.probe()

    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.due(clock() + 1000)
    assert not breaker.allow()


def test_an_answered_ping_closes_it(breaker: Breaker, clock: FakeClock) -> None:
    breaker.trip()
    breaker.probe()

    breaker.probed(True)

    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()
    assert not breaker.due(clock() + 1000)


def test_the_back_off_doubles_with_every_unanswered_ping_up_to_its_limit(breaker: Breaker, clock: FakeClock) -> None:
    breaker.trip()
    waits = []
    for _ in range(5):
        waits.append(breaker.probe_in_s(clock()))
        clock.advance(waits[-1])
        breaker.probe()
        breaker.probed(False)

    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_tier_that_answers_pings_and_fails_at_work_is_asked_ever_more_rarely(
    breaker: Breaker, clock: FakeClock
) -> None:
    waits = []
    for _ in range(3):
        for _ in range(3):
            breaker.failure()
        waits.append(breaker.probe_in_s(clock()))
        clock.advance(waits[-1])
        breaker.probe()
        breaker.probed(True)

    assert waits == [1.0, 2.0, 4.0]


def test_work_that_is_answered_resets_the_back_off(breaker: Breaker, clock: FakeClock) -> None:
    for _ in range(3):
        breaker.trip()
        breaker.probe()
        breaker.probed(True)

    breaker.success()
    breaker.trip()

    assert breaker.probe_in_s(clock()) == 1.0


def test_late_answers_of_old_transfers_change_nothing_while_it_is_open(breaker: Breaker, clock: FakeClock) -> None:
    breaker.trip()

    breaker.success()
    breaker.failure()
    breaker.trip()

    assert breaker.state is BreakerState.OPEN
    assert breaker.num_opened == 1
    assert breaker.probe_in_s(clock()) == 1.0


@pytest.mark.parametrize(
    ("failures_to_open", "probe_after_s", "probe_max_s"), [(0, 1.0, 30.0), (3, 0.0, 30.0), (3, 2.0, 1.0)]
)
def test_impossible_numbers_are_refused(failures_to_open: int, probe_after_s: float, probe_max_s: float) -> None:
    with pytest.raises(ConfigError, match="breaker"):
        Breaker(failures_to_open, probe_after_s, probe_max_s)
