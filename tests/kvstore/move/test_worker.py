"""The background thread of small jobs. Threads meet by events, never by sleeping."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from kvstore.errors import ConfigError
from kvstore.move.worker import Worker
from tests.helpers.waiting import WAIT_S


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test", max_queue=4)
    yield worker
    worker.close(WAIT_S)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_its_thread_runs_where_it_is_told_and_nobody_else_does() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    worker = Worker("bound", cpus=one)
    seen: list[set[int]] = []

    assert worker.submit(lambda: seen.append(os.sched_getaffinity(0)))
    worker.close(WAIT_S)

    assert seen == [one]
    assert os.sched_getaffinity(0) == before


def hold(worker: Worker, gate: threading.Event) -> None:
    """Keep the worker busy until the gate opens; returns once it is."""
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(WAIT_S)

    assert worker.submit(wait)
    assert begun.wait(WAIT_S)


def test_jobs_run_in_order_on_one_named_thread(worker: Worker) -> None:
    seen: list[tuple[int, str]] = []

    def note(number: int) -> None:
        seen.append((number, threading.current_thread().name))

    for number in range(4):
        assert worker.submit(partial(note, number))

    assert worker.flush(WAIT_S)
    assert seen == [(number, "kvstore-test") for number in range(4)]


def test_a_full_queue_refuses_and_runs_what_it_took(worker: Worker, gate: threading.Event) -> None:
    ran: list[int] = []
    hold(worker, gate)

    taken = [worker.submit(partial(ran.append, number)) for number in range(5)]
    gate.set()

    assert taken == [True] * 4 + [False]
    assert worker.flush(WAIT_S)
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_error_is_counted_and_logged_and_the_next_job_runs(
    worker: Worker, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    ran = threading.Event()
    worker.submit(fail)
    worker.submit(ran.set)

    assert worker.flush(WAIT_S)
    assert ran.is_set()
    assert (worker.num_done, worker.num_errors) == (2, 1)
    assert "a job failed" in caplog.text


def test_flush_gives_up_when_the_time_is_over(worker: Worker, gate: threading.Event) -> None:
    worker.submit(lambda: gate.wait(WAIT_S))

    assert not worker.flush(0.0)
    gate.set()
    assert worker.flush(WAIT_S)


def test_a_job_may_submit_another(worker: Worker) -> None:
    ran = threading.Event()

    worker.submit(lambda: worker.submit(ran.set))

    assert ran.wait(WAIT_S)


def test_close_finishes_what_waits_and_then_takes_nothing() -> None:
    worker = Worker("test")
    ran: list[int] = []
    for number in range(3):
        worker.submit(partial(ran.append, number))

    assert worker.close(WAIT_S) == 0

    assert ran == [0, 1, 2]
    assert not worker.submit(partial(ran.append, 9))
    assert worker.close(WAIT_S) == 0


def test_close_says_how_many_jobs_it_dropped_behind_one_that_hangs(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker("test")
    ran: list[int] = []
    hold(worker, gate)
    worker.submit(partial(ran.append, 1))
    worker.submit(partial(ran.append, 2))

    assert worker.close(0.01) == 2

    assert "its job still runs" in caplog.text
    gate.set()
    worker.close(WAIT_S)
    assert ran == []


def interrupt(thread: threading.Thread) -> None:
    """An exception of another thread's making, as a watchdog raises it."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def test_jobs_that_are_dropped_or_cut_short_are_told(gate: threading.Event) -> None:
    worker = Worker("lossy")
    lost: list[str] = []
    begun, told = threading.Event(), threading.Event()

    def work_for_long() -> None:
        begun.set()
        while not gate.wait(0.01):
            pass

    def lose_first() -> None:
        lost.append("first")
        told.set()

    worker.submit(work_for_long, lost=lose_first)
    assert begun.wait(WAIT_S)
    interrupt(worker._thread)
    assert told.wait(WAIT_S)
    begun.clear()
    worker.submit(work_for_long, lost=lambda: lost.append("second"))
    worker.submit(lambda: None, lost=lambda: lost.append("third"))
    assert begun.wait(WAIT_S)

    assert worker.close(0.0) == 1

    assert lost == ["first", "third"]  # the second runs on, and comes to its end


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_ended_between_two_jobs_takes_none_that_nobody_would_do() -> None:
    worker = Worker("ended")
    lost = threading.Event()
    interrupt(worker._thread)

    is_taken = worker.submit(lambda: None, lost=lost.set)  # wakes it
    worker._thread.join(WAIT_S)

    assert not worker._thread.is_alive()
    assert lost.is_set() == is_taken
    assert not worker.submit(lambda: None)
    assert worker.close(WAIT_S) == 0


def test_a_job_may_close_its_worker() -> None:
    worker = Worker("test")
    closed = threading.Event()

    def close() -> None:
        worker.close(WAIT_S)
        closed.set()

    worker.submit(close)

    assert closed.wait(WAIT_S)


def test_no_thread_is_left_after_close() -> None:
    worker = Worker("leak")
    worker.close(WAIT_S)

    assert not [t for t in threading.enumerate() if t.name == "kvstore-leak"]


def test_a_queue_of_no_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_queue is 0"):
        Worker("test", max_queue=0)
