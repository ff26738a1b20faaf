"""Loads beside the forward: an idle engine takes them so, right to the bit, and one that goes wrong spoils nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from connectors.vllm.layers import LayeredLoads
from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, Engine, make_prompt
from tests.helpers.waiting import WAIT_S

pytestmark = pytest.mark.timeout(600)
LENGTH = 700
HIT = (LENGTH - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def engine(open_engine: Callable[..., Engine]) -> Engine:
    return open_engine({"save": "all"})


@pytest.fixture
def beside(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests whose load went beside the forward, from now on; the engine has loaded before."""
    prompt = make_prompt(LENGTH, 1)
    until = time.monotonic() + WAIT_S  # after a failure nothing is loaded for a while
    while engine.ask(prompt, 2)["cached"] == 0 and time.monotonic() < until:
        engine.forget_own_cache()
    engine.forget_own_cache()
    requests: list[str] = []
    start = LayeredLoads.start

    def note(self: LayeredLoads, job: Any, slots: Any) -> bool:
        requests.append(job.request)
        return start(self, job, slots)

    monkeypatch.setattr(LayeredLoads, "start", note)
    return requests


def stored(engine: Engine, seed: int) -> list[int]:
    prompt = make_prompt(LENGTH, seed)
    engine.ask(prompt)
    engine.forget_own_cache()
    return prompt


def test_a_single_request_is_loaded_beside_its_forward(engine: Engine, reference: Reference, beside: list[str]) -> None:
    prompts = [stored(engine, seed) for seed in range(10, 14)]
    for prompt in prompts:
        engine.forget_own_cache()
        answer = engine.ask(prompt)
        reference.check([answer], [prompt])
        assert answer["cached"] == HIT

    assert len(beside) == len(prompts)


def test_of_a_burst_the_first_goes_beside_and_the_others_aside(
    engine: Engine, reference: Reference, beside: list[str]
) -> None:
    prompts = [stored(engine, seed) for seed in range(20, 26)]

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert [answer["cached"] for answer in answers] == [HIT] * len(prompts)
    assert len(beside) == 1


def test_requests_that_share_what_is_loaded_beside_them_get_the_same_tokens(
    engine: Engine, reference: Reference, beside: list[str]
) -> None:
    shared = stored(engine, 30)
    prompts = [shared + make_prompt(10 + n, 31 + n) for n in range(4)]

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert beside


@pytest.mark.parametrize("fault", ["the copy fails", "a layer is not waited for"])
def test_a_load_that_goes_wrong_beside_its_forward_is_computed_and_nothing_wrong_is_saved(
    engine: Engine, reference: Reference, beside: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = 40 + 10 * len(fault)
    shared = stored(engine, seed)
    prompts = [shared + make_prompt(100 + n, seed + 1 + n) for n in range(3)]  # they fill blocks after what is missing
    failures = engine.half.counters["load_failures"]

    with monkeypatch.context() as broken:
        if fault == "the copy fails":
            broken.setattr(engine.worker._device, "copy_in", fail)
        else:
            broken.setattr(LayeredLoads, "wait", lambda self, layer: None)
        answers = engine.generate(prompts)

    assert beside
    assert engine.half.counters["load_failures"] > failures
    reference.check(answers, prompts)
    for prompt in (*prompts, shared):
        engine.forget_own_cache()
        reference.check([engine.ask(prompt)], [prompt])
    assert engine.scheduler.connector._hook_errors == 0


def fail(*_: object) -> None:
    raise RuntimeError("no copy today")


def test_nothing_is_held_when_all_is_quiet(engine: Engine) -> None:
    engine.settle()

    assert engine.half.store.stats()["leases"] == 0
    assert engine.scheduler.kv_cache_manager.usage == 0
    engine.half.store.check()
