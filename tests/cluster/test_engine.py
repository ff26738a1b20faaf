"""The engine with a model that only says what it was asked to do, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from connectors.transformers.report import Piece, Report
from connectors.transformers.runner import Job, ModelSpec
from kvstore.cluster.admission import Admission, Refused
from kvstore.cluster.answer import ReplicaAnswer
from kvstore.cluster.engine import Engine
from kvstore.config.sections import Config
from kvstore.errors import RequestError, StoreClosed

CHUNK = 10


@dataclass
class FakeModel:
    """What is shared by all runs. waiting: names of prompts that wait for the store as long as they are in here."""

    log: list[str] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)
    store_closed: bool = False


class FakeRun:
    """One chunk per 10 prompt tokens, then tokens. Its name is its first token."""

    def __init__(self, model: FakeModel, job: Job) -> None:
        self.model, self.job, self.name = model, job, chr(job.tokens[0])
        self.report = Report(len(job.tokens))
        self.is_waiting = self.is_done = False
        self.finish_reason = "cancelled"
        self._chunks = -(-len(job.tokens) // CHUNK)

    def step(self) -> list[Piece]:
        self.is_waiting = self.name in self.model.waiting
        if self.is_waiting:
            return []
        if self._chunks:
            self._chunks -= 1
            self.model.log.append(self.name.upper())
            self.report.prefill_s += 0.1
            return []
        if self.name == "!" and self.report.new_tokens == 1:
            raise RuntimeError("a forward failed")
        self.model.log.append(self.name)
        self.report.new_tokens += 1
        if self.report.new_tokens == self.job.max_new_tokens:
            self.is_done, self.finish_reason = True, "length"
        return [Piece(0, self.name)]

    def close(self) -> None:
        self.model.closed.append(self.name)


class FakeRunner:
    """Stands where `Runner` does."""

    max_tokens = 1000

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.store = self

    def warm_up(self) -> Report:
        return Report(100, prefill_s=1.0, new_tokens=11, decode_s=1.0)

    def start(self, job: Job) -> FakeRun:
        if job.tokens[0] == ord("?"):
            raise RequestError("prompt: no")
        return FakeRun(self.model, job)

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self, timeout_s: float) -> None:
        self.model.store_closed = True


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
async def engine(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    monkeypatch.setattr("kvstore.cluster.engine.Runner", lambda spec, config: FakeRunner(model))
    engine = Engine(ModelSpec("", "", prefill_chunk=CHUNK), Config(), Admission(10, 1000), max_running=3)
    await engine.open()
    yield engine
    await engine.close(0.0)


def job(name: str, prompt_tokens: int = CHUNK, new_tokens: int = 2) -> Job:
    return Job([ord(name)] * prompt_tokens, new_tokens)


def ask(engine: Engine, *jobs: Job) -> list[ReplicaAnswer]:
    return [engine.submit(one, time.monotonic()) for one in jobs]


async def text(answer: ReplicaAnswer) -> str:
    return "".join([piece.text async for piece in answer])


async def all_text(answers: list[ReplicaAnswer]) -> list[str]:
    return list(await asyncio.gather(*map(text, answers)))


async def test_warming_up_measures_the_rates(engine: Engine) -> None:
    assert engine.admission.prefill.tokens_per_s == 100
    assert engine.admission.decode.tokens_per_s == pytest.approx(10)


async def test_a_long_prompt_holds_up_the_tokens_of_others_for_one_chunk_only(engine: Engine, model: FakeModel) -> None:
    answers = ask(engine, job("a", new_tokens=5), job("b", prompt_tokens=4 * CHUNK))

    assert await all_text(answers) == ["aaaaa", "bb"]
    assert "".join(model.log) == "A" + "a" + "aB" + "aB" + "aB" + "aB" + "bb"


async def test_prompts_are_computed_one_after_another_and_tokens_in_turns(engine: Engine, model: FakeModel) -> None:
    answers = ask(engine, job("a", prompt_tokens=2 * CHUNK), job("b"))

    await all_text(answers)

    assert "".join(model.log) == "AAa" + "aB" + "bb"


async def test_a_prompt_that_waits_for_the_store_lets_the_next_one_go_first(engine: Engine, model: FakeModel) -> None:
    model.waiting = {"a"}
    first, second = ask(engine, job("a"), job("b"))

    assert await text(second) == "bb"
    model.waiting.clear()
    assert await text(first) == "aa"

    assert "".join(model.log) == "BbbAaa"


async def test_no_more_than_max_running_are_begun_and_the_rest_in_their_order(engine: Engine, model: FakeModel) -> None:
    model.waiting = {"a", "b", "c"}
    answers = ask(engine, *(job(name) for name in "abcde"))
    while engine.num_running < 3:
        await asyncio.sleep(0.001)

    assert (engine.num_running, engine.num_queued) == (3, 2)
    model.waiting.clear()
    assert await all_text(answers) == ["aa", "bb", "cc", "dd", "ee"]
    assert [name for name in model.log if name.isupper()] == list("ABCDE")


async def test_the_last_piece_says_why_it_ended(engine: Engine) -> None:
    (answer,) = ask(engine, job("a", new_tokens=3))

    assert [piece.finish_reason async for piece in answer] == [None, None, "length"]


async def test_what_is_done_is_free_again(engine: Engine) -> None:
    answers = ask(engine, job("a"), job("b"))
    assert engine.admission.tokens == 24

    await all_text(answers)

    assert (engine.admission.tokens, engine.num_running, engine.num_queued) == (0, 0, 0)


async def test_a_request_nobody_waits_for_is_closed_wherever_it_is(engine: Engine, model: FakeModel) -> None:
    model.waiting = {"a", "b", "c"}
    running, *_, queued = ask(engine, *(job(name) for name in "abcd"))
    while engine.num_running < 3:
        await asyncio.sleep(0.001)

    engine.cancel(running)
    engine.cancel(queued)
    engine.cancel(queued)
    while "a" not in model.closed:
        await asyncio.sleep(0.001)

    assert (engine.num_running, engine.num_queued) == (2, 0)
    assert engine.admission.tokens == 2 * 12
    assert model.closed == ["a"]


async def test_cancelling_in_the_middle_of_its_tokens_stops_them(engine: Engine, model: FakeModel) -> None:
    (answer,) = ask(engine, job("a", new_tokens=100_0 - CHUNK))
    async for _ in answer:
        engine.cancel(answer)
        break
    while engine.num_running:
        await asyncio.sleep(0.001)

    assert model.closed == ["a"]
    assert len(model.log) < 100


async def test_a_forward_that_fails_ends_one_request_and_no_other(engine: Engine, model: FakeModel) -> None:
    bad, good = ask(engine, job("!", new_tokens=5), job("g", new_tokens=5))

    with pytest.raises(RuntimeError, match="a forward failed"):
        await text(bad)

    assert await text(good) == "ggggg"
    assert model.closed == ["!"]
    assert engine.admission.tokens == 0


async def test_a_job_the_model_cannot_do_never_gets_in(engine: Engine) -> None:
    with pytest.raises(RequestError, match="prompt: no"):
        engine.submit(job("?"), time.monotonic())

    assert engine.admission.tokens == 0


async def test_a_job_there_is_no_room_for_is_refused(engine: Engine, model: FakeModel) -> None:
    model.waiting = {"a"}
    ask(engine, job("a", prompt_tokens=900))

    with pytest.raises(Refused):
        engine.submit(job("b", prompt_tokens=100), time.monotonic())

    assert engine.num_queued + engine.num_running == 1


async def test_what_is_left_of_a_request_shrinks_as_it_is_computed(engine: Engine) -> None:
    (answer,) = ask(engine, job("a", prompt_tokens=50, new_tokens=4))
    assert engine.admission.tokens_left == 54

    left = [engine.admission.tokens_left async for _ in answer]

    assert left[-1] == 0
    assert max(left) <= 3


async def test_the_first_token_is_timed_from_the_arrival(engine: Engine) -> None:
    arrived = time.monotonic() - 100.0
    answer = engine.submit(job("a"), arrived)
    await text(answer)

    assert 100.0 <= answer.queue_s <= answer.ttft_s <= time.monotonic() - arrived


async def test_closing_finishes_what_is_inside(engine: Engine, model: FakeModel) -> None:
    answers = ask(engine, *(job(name, new_tokens=20) for name in "abcd"))

    await engine.close(30.0)

    assert await all_text(answers) == [20 * name for name in "abcd"]
    assert model.store_closed


async def test_what_does_not_finish_in_time_is_ended_with_an_error(engine: Engine, model: FakeModel) -> None:
    model.waiting = {"a"}
    (answer,) = ask(engine, job("a"))
    while not engine.num_running:
        await asyncio.sleep(0.001)

    await engine.close(0.0)

    with pytest.raises(StoreClosed, match="the replica is closing"):
        await text(answer)
    assert model.closed == ["a"]


async def test_a_fault_of_the_loop_is_seen_and_told_to_all(
    engine: Engine, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.waiting = {"a"}
    (answer,) = ask(engine, job("a"))

    async def fail() -> bool:
        raise ValueError("a bug")

    monkeypatch.setattr(engine, "_round", fail)

    with pytest.raises(ValueError, match="a bug"):
        await text(answer)
    await asyncio.sleep(0)
    assert not engine.is_alive


async def test_metrics_follow(engine: Engine) -> None:
    await all_text(ask(engine, job("a", new_tokens=3), job("b", prompt_tokens=30)))

    told = engine.metrics.render().decode()

    assert "kvstore_replica_ttft_seconds_count 2.0" in told
    assert "kvstore_replica_time_per_output_token_seconds_count 2.0" in told
    assert "kvstore_replica_prompt_tokens_total 40.0" in told
    assert "kvstore_replica_new_tokens_total 5.0" in told
    assert "kvstore_replica_running_requests 0.0" in told
