"""Too little room: in the engine's own cache, in the host slab, and requests that go away while they are loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, PAGE_BYTES, Engine, make_prompt
from tests.helpers.waiting import WAIT_S

pytestmark = pytest.mark.timeout(600)
# 40 blocks of 32 tokens, 1280 tokens for everybody, and prompts are computed in chunks of 256.
SMALL = {"num_gpu_blocks_override": 40, "max_model_len": 1024, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def small(open_engine: Callable[..., Engine]) -> Engine:
    return open_engine({"save": "all"}, **SMALL)


def test_what_the_engine_evicted_comes_back(small: Engine, reference: Reference) -> None:
    prompts = [make_prompt(900, seed) for seed in range(3)]
    for prompt in prompts:
        small.ask(prompt)
        small.settle()

    answers = [small.ask(prompt) for prompt in prompts]

    reference.check(answers, prompts)
    assert [answer["cached"] for answer in answers] == [899 // BLOCK * BLOCK] * 3
    assert small.half.counters["loaded_tokens"] > 0


def test_after_a_load_the_rest_of_a_prompt_is_computed_and_saved_in_chunks(small: Engine, reference: Reference) -> None:
    whole = make_prompt(900, 10)
    fork = whole[:340] + make_prompt(600, 11)
    saved = small.half.counters["saved_pages"]
    small.ask(whole)
    small.forget_own_cache()
    assert small.half.counters["saved_pages"] - saved == 900 // BLOCK  # the blocks of every chunk

    first = small.ask(fork)
    small.forget_own_cache()
    second = small.ask(fork)

    reference.check([first, second], [fork, fork])
    assert (first["cached"], second["cached"]) == (340 // BLOCK * BLOCK, 939 // BLOCK * BLOCK)


def test_preempted_requests_answer_as_without_us_and_load_what_they_had(small: Engine, reference: Reference) -> None:
    prompts = [make_prompt(200, 100 + seed) for seed in range(6)]
    before = small.metrics().get("vllm:num_preemptions", 0)
    loaded = small.half.counters["loaded_tokens"]

    answers = small.generate(prompts, max_tokens=150)

    assert small.metrics()["vllm:num_preemptions"] > before
    reference.check(answers, prompts)
    assert small.half.counters["loaded_tokens"] > loaded
    assert not small.scheduler.requires_kv_delivery  # a preempted request does not wait for its saves


def test_a_slab_smaller_than_a_prompt_keeps_what_fits(open_engine: Callable[..., Engine], reference: Reference) -> None:
    engine = open_engine({"host": {"capacity_bytes": 16 * PAGE_BYTES, "huge_pages": False}})
    prompts = [make_prompt(1500, 200 + seed) for seed in range(3)]

    answers = [engine.ask(prompt) for prompt in prompts for _ in range(2)]
    engine.forget_own_cache()
    answers += [engine.ask(prompt) for prompt in prompts]

    reference.check(answers, [*[prompt for prompt in prompts for _ in range(2)], *prompts])
    assert engine.half.counters["skipped_pages"] > 0
    engine.settle()
    engine.half.store.check()


class SlowCopies:
    """The worker's device, with copies that take their time."""

    def __init__(self, device: Any, seconds: float) -> None:
        self._device = device
        self._seconds = seconds
        self.name = device.name

    def copy_in(self, *arguments: Any) -> Any:
        time.sleep(self._seconds)
        return self._device.copy_in(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class TestAbort:
    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine]) -> Engine:
        return open_engine({})

    @pytest.fixture
    def slow(self, engine: Engine) -> Iterator[None]:
        worker = engine.worker
        device = worker._device
        worker._device = SlowCopies(device, 0.3)
        yield
        worker._device = device

    def test_a_request_that_goes_away_while_it_is_loaded_leaves_nothing(
        self, engine: Engine, slow: None, reference: Reference
    ) -> None:
        from vllm import SamplingParams

        prompt = make_prompt(900, 301)
        engine.ask(prompt)
        engine.forget_own_cache()
        llm_engine = engine.llm.llm_engine
        core = llm_engine.engine_core.engine_core
        llm_engine.add_request("gone", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=4))
        until = time.monotonic() + WAIT_S
        while not engine.half._loads._under_way and time.monotonic() < until:
            llm_engine.step()
        assert engine.half._loads._under_way

        llm_engine.abort_request(["gone"])
        while core.scheduler.has_requests() and time.monotonic() < until:
            core.step()

        assert not core.scheduler.requests
        assert engine.half.store.stats()["leases"] == 0
        assert engine.scheduler.kv_cache_manager.usage == 0
        reference.check([engine.ask(prompt)], [prompt])

    def test_others_run_while_one_is_loaded(self, engine: Engine, slow: None, reference: Reference) -> None:
        stored, fresh = make_prompt(900, 302), make_prompt(100, 303)
        engine.ask(stored)
        engine.forget_own_cache()

        answers = engine.generate([stored, fresh])

        reference.check(answers, [stored, fresh])
        assert [answer["cached"] for answer in answers] == [899 // BLOCK * BLOCK, 0]
