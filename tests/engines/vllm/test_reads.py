"""What vLLM lets a load replace: nothing of a request that must not read caches, all but one token of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, PAGE_BYTES, STORE, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)
LENGTH = 20 * BLOCK


class TestRequestsThatMustNotReadCaches:
    """Every position of them has to be computed: vLLM asks a connector all the same, and overrules its answer."""

    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Engine:
        disk = {"path": str(tmp_path_factory.mktemp("disk")), "capacity_bytes": 64 * MiB}
        host = {"capacity_bytes": 24 * PAGE_BYTES, "huge_pages": False}  # room for one prompt
        return open_engine({"disk": disk, "host": host, "store": {**STORE, "single_flight": True}})

    def ask(self, engine: Engine, prompt: list[int], **sampling: Any) -> Any:
        from vllm import SamplingParams

        engine.forget_own_cache()
        options = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **sampling)
        (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], options, use_tqdm=False)
        engine.settle()
        return output

    @pytest.mark.parametrize(
        "asking", [{"prompt_logprobs": 1}, {"prompt_logprobs": 0}, {"skip_reading_prefix_cache": True}]
    )
    def test_nothing_is_fetched_counted_or_claimed_for_them(self, engine: Engine, asking: dict[str, Any]) -> None:
        prompt = make_prompt(LENGTH + 5, 1)
        cold = self.ask(engine, prompt)
        self.ask(engine, make_prompt(LENGTH + 5, 2))  # now the first one's pages are on disk only
        before = engine.half.store.stats()

        output = self.ask(engine, prompt, **asking)

        after = engine.half.store.stats()
        same = ("lookups", "matched_tokens", "miss_tokens", "hit_tokens", "compute_claims")
        assert {name: after[name] for name in same} == {name: before[name] for name in same}
        assert after["lane_bytes"]["disk"]["fetch"] == before["lane_bytes"]["disk"]["fetch"]
        assert after["leases"] == 0
        assert output.num_cached_tokens == 0
        assert output.outputs[0].token_ids == cold.outputs[0].token_ids

    def test_what_they_compute_is_saved_for_others(self, engine: Engine) -> None:
        prompt = make_prompt(LENGTH + 5, 3)

        computed = self.ask(engine, prompt, prompt_logprobs=1)
        loaded = self.ask(engine, prompt)

        assert (computed.num_cached_tokens, loaded.num_cached_tokens) == (0, LENGTH)
        assert computed.outputs[0].token_ids == loaded.outputs[0].token_ids


class TestAPromptThatEndsOnABorder:
    def ask(self, engine: Engine, prompt: list[int]) -> tuple[dict[str, Any], int]:
        """The answer without vLLM's own cache, and how many tokens of the prompt were computed for it."""
        engine.forget_own_cache()
        half, scheduled = engine.half, []
        plan_step = half.plan_step

        def plan(tokens: Any, block_ids: Any) -> Any:
            scheduled.extend(tokens.values())
            return plan_step(tokens, block_ids)

        half.plan_step = plan
        try:
            answer = engine.ask(prompt)
        finally:
            half.plan_step = plan_step
        return answer, sum(scheduled) - (len(answer["tokens"]) - 1)  # the others are those of the answer

    def test_one_token_of_it_is_computed_after_a_load_aside(
        self, open_engine: Callable[..., Engine], reference: Reference
    ) -> None:
        engine = open_engine({"load": "async"})
        prompts = [make_prompt(LENGTH, 1), make_prompt(2 * BLOCK, 2)]
        for prompt in prompts:
            engine.ask(prompt)

        for prompt in (*prompts, *prompts):
            answer, computed = self.ask(engine, prompt)

            reference.check([answer], [prompt])
            assert computed == 1
        engine.settle()
        assert engine.half.store.stats()["leases"] == 0
        assert engine.scheduler.kv_cache_manager.usage == 0

    def test_what_comes_after_it_is_right_too(self, open_engine: Callable[..., Engine], reference: Reference) -> None:
        engine = open_engine({"load": "async", "save": "all"})
        prompt = make_prompt(LENGTH, 3)
        engine.ask(prompt, 40)
        engine.forget_own_cache()

        first = engine.ask(prompt, 40)
        engine.forget_own_cache()
        turn = [*prompt, *first["tokens"], *make_prompt(20, 4)]
        second = engine.ask(turn)

        reference.check([first, second], [prompt, turn])
        assert second["cached"] == (LENGTH + 39) // BLOCK * BLOCK

    def test_many_at_once_get_the_same_answers(self, open_engine: Callable[..., Engine], reference: Reference) -> None:
        engine = open_engine({})
        head = make_prompt(4 * BLOCK, 5)
        prompts = [[*head, *make_prompt(LENGTH - len(head), 10 + n)] for n in range(6)]
        engine.generate(prompts)
        engine.forget_own_cache()

        answers = engine.generate(prompts)

        reference.check(answers, prompts)
        assert all(answer["cached"] >= LENGTH - BLOCK for answer in answers)

    @pytest.mark.parametrize("load", ["async", "auto"])
    def test_a_copy_that_fails_is_computed(
        self, open_engine: Callable[..., Engine], reference: Reference, load: str
    ) -> None:
        engine = open_engine({"load": load})
        prompt = make_prompt(LENGTH, 6)
        engine.ask(prompt)
        device = engine.worker._device

        def fail(*_: object) -> None:
            raise RuntimeError("no copy today")

        device.copy_in = fail
        try:
            answer, _ = self.ask(engine, prompt)
        finally:
            del device.copy_in

        reference.check([answer], [prompt], cached=0)
        assert engine.half.counters["load_failures"] == 1

    @pytest.mark.parametrize(("block_size", "expected"), [(32, 32), (128, 1)])
    def test_an_idle_engine_on_a_cpu_computes_a_short_last_block_and_loads_a_long_one(
        self, open_engine: Callable[..., Engine], reference: Reference, block_size: int, expected: int
    ) -> None:
        engine = open_engine({}, block_size=block_size)
        prompt = make_prompt(5 * 128, 7)
        engine.ask(prompt)
        self.ask(engine, prompt)  # from now on copies are known to work

        answer, computed = self.ask(engine, prompt)

        reference.check([answer], [prompt], cached=LENGTH - expected)
        assert computed == expected

    def test_with_sliding_windows_its_last_block_is_computed(
        self, open_engine: Callable[..., Engine], reference: Reference
    ) -> None:
        engine = open_engine({"load": "async"}, kind="sliding")
        prompt = make_prompt(LENGTH, 8)
        engine.ask(prompt)

        answer, computed = self.ask(engine, prompt)

        reference.check([answer], [prompt], kind="sliding")
        assert computed == BLOCK


def test_every_counter_is_there_before_anything_happens(open_engine: Callable[..., Engine], tmp_path: Path) -> None:
    from connectors.vllm.metrics import COUNTERS

    engine = open_engine({"disk": {"path": str(tmp_path), "capacity_bytes": 8 * MiB}})

    numbers = engine.metrics()
    plain = {f"vllm:kvstore_{name}" for name, _, label in COUNTERS.values() if not label}
    assert plain <= numbers.keys()
    assert {numbers[name] for name in plain} == {0.0}
    engine.ask(make_prompt(100, 1))
    engine.ask(make_prompt(10, 2))
    by_tier = {"hit_tokens.host", "hit_tokens.disk", "corrupt_pages.disk", "breaker_opens.disk"}
    assert {f"vllm:kvstore_{name}" for name in by_tier} <= engine.metrics().keys()
