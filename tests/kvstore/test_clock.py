from __future__ import annotations

import logging
import time

import pytest

from kvstore.clock import SYSTEM_CLOCK, Clock, boot_time
from tests.helpers.clocks import Clocks


def test_the_systems_clocks_are_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SYSTEM_CLOCK.wall(), SYSTEM_CLOCK.steady(), SYSTEM_CLOCK.boot()

    assert abs(before[0] - time.time()) < 60
    assert before[1] <= SYSTEM_CLOCK.steady()
    assert before[2] <= SYSTEM_CLOCK.boot()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no clock that counts its sleep")
def test_the_boot_clock_counts_what_the_machine_slept() -> None:
    slept = boot_time() - time.monotonic()

    assert slept > -1.0
    assert SYSTEM_CLOCK.boot() - SYSTEM_CLOCK.steady() == pytest.approx(slept, abs=1.0)


@pytest.mark.parametrize(("seconds", "words"), [(259_200.0, "forward by 259200.0 s"), (-90.0, "back by 90.0 s")])
def test_a_step_of_the_wall_clock_is_logged_once(seconds: float, words: str, caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    clocks.look()
    clocks.advance(5.0)
    clocks.set_by(seconds)
    for _ in range(3):
        clocks.look()
        clocks.advance(5.0)

    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert words in caplog.text
    assert clocks.num_steps == 1


def test_a_machine_that_slept_is_logged_and_is_no_step(caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    clocks.look()
    clocks.sleep(28_800.0)
    clocks.look()
    clocks.look()

    assert [record.getMessage() for record in caplog.records] == [
        "this machine slept for 28800.0 s; times to live went on, waits did not"
    ]
    assert clocks.num_steps == 0


def test_small_corrections_are_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    for _ in range(100):
        clocks.look()
        clocks.set_by(0.5)

    assert not caplog.records


def test_the_first_look_has_nothing_to_compare_with(caplog: pytest.LogCaptureFixture) -> None:
    Clock(wall=lambda: 0.0, steady=lambda: 1e9, boot=lambda: 5.0).look()

    assert not caplog.records
