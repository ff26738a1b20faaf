from __future__ import annotations

import pytest

from kvstore.cluster.admission import Admission, Refused
from kvstore.vllm.books import EngineBooks
from kvstore.vllm.counters import EngineCounters


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(prompt: int, new: int) -> EngineCounters:
    return EngineCounters(prompt_tokens=prompt, new_tokens=new)


def make(max_running: int = 2) -> tuple[EngineBooks, Clock]:
    clock = Clock()
    return EngineBooks(Admission(1, 1000), max_running, clock), clock


def test_those_beyond_what_the_engine_computes_at_once_wait() -> None:
    books, _ = make(max_running=2)
    tickets = [books.enter(10, 5) for _ in range(3)]

    assert (books.num_running, books.num_queued) == (2, 1)
    with pytest.raises(Refused, match="1 requests wait"):
        books.enter(10, 5)

    books.leave(tickets[0])
    assert (books.num_inside, books.num_queued, books.admission.tokens) == (2, 0, 30)


def test_rates_are_those_of_the_engine_with_all_its_requests_while_it_has_any() -> None:
    books, clock = make()
    books.observe(counted(0, 0))
    clock.now = 100.0  # idle: counts for nothing
    first, second = books.enter(400, 10), books.enter(400, 10)
    clock.now = 102.0
    books.observe(counted(800, 0))
    assert books.admission.prefill.tokens_per_s == 400.0

    clock.now = 103.0
    books.leave(first)
    books.leave(second)
    clock.now = 150.0
    books.observe(counted(800, 20))

    assert books.admission.decode.tokens_per_s == 20.0
    assert books.admission.prefill.tokens_per_s == 400.0


def test_seconds_without_a_token_count_for_the_tokens_that_come_later() -> None:
    books, clock = make()
    books.observe(counted(0, 0))
    books.enter(1000, 0)
    for second in range(1, 10):
        clock.now = float(second)
        books.observe(counted(0, 0))
    clock.now = 10.0

    books.observe(counted(1000, 0))

    assert books.admission.prefill.tokens_per_s == 100.0


def test_mixed_work_comes_to_the_rates_that_explain_it() -> None:
    books, clock = make()
    books.observe(counted(0, 0))
    books.enter(500, 500)
    prompt = new = 0
    for step in range(200):  # an engine of 300 prompt tokens/s or 40 new ones, in another mixture each second
        share = (step % 4) / 4
        prompt, new = prompt + int(300 * share), new + int(40 * (1 - share))
        clock.now += 1.0
        books.observe(counted(prompt, new))

    assert books.admission.prefill.tokens_per_s == pytest.approx(300, rel=0.1)
    assert books.admission.decode.tokens_per_s == pytest.approx(40, rel=0.1)


def test_a_server_that_was_started_anew_is_measured_anew() -> None:
    books, clock = make()
    books.observe(counted(5000, 100))
    books.enter(100, 10)
    clock.now = 50.0
    books.observe(counted(10, 0))
    clock.now = 51.0

    books.observe(counted(110, 0))

    assert books.admission.prefill.tokens_per_s == 100.0
