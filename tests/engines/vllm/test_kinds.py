"""Models of every kind of attention that vLLM runs on a CPU, and a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.demo.models import find_smollm2
from tests.engines.vllm.answers import assert_same, engine_dtype
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, STORE, Engine, EngineProcess, make_prompt

pytestmark = pytest.mark.timeout(600)


class TestSlidingWindow:
    """Five layers in six look back 128 tokens; vLLM makes six groups of them."""

    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Engine:
        folder = tmp_path_factory.mktemp("disk")
        return open_engine({"disk": {"path": str(folder), "capacity_bytes": 64 * MiB}, "save": "all"}, kind="sliding")

    def test_there_are_groups_with_and_without_a_window(self, engine: Engine) -> None:
        windows = [group.window for group in engine.half._engine.layout.groups]

        assert None in windows
        assert 128 in windows

    @pytest.mark.parametrize("shared", [1000, 640, 100])
    def test_tokens_are_those_without_us(self, engine: Engine, reference: Reference, shared: int) -> None:
        whole = make_prompt(1000, 1)
        engine.ask(whole)
        engine.forget_own_cache()
        prompt = whole[:shared] + make_prompt(40, shared)

        answer = engine.ask(prompt)

        reference.check([answer], [prompt], kind="sliding")
        assert answer["cached"] == shared // BLOCK * BLOCK

    def test_only_the_window_of_a_sliding_group_is_loaded(self, engine: Engine) -> None:
        prompt = make_prompt(1000, 5)
        engine.ask(prompt)
        engine.forget_own_cache()
        layout = engine.half._engine.layout
        before = engine.half.counters["loaded_bytes"]

        engine.ask(prompt)

        num_blocks = [layout.window_blocks(index) or 999 // BLOCK for index in range(len(layout.groups))]
        pages = sum(group.page_bytes * count for group, count in zip(layout.groups, num_blocks, strict=True))
        assert engine.half.counters["loaded_bytes"] - before == pages

    def test_a_conversation_goes_on(self, engine: Engine, reference: Reference) -> None:
        prompt = make_prompt(300, 7)
        for turn in range(3):
            engine.forget_own_cache()
            answer = engine.ask(prompt, 24)
            reference.check([answer], [prompt], kind="sliding")
            assert (answer["cached"] > 0) == (turn > 0)
            prompt = prompt + answer["tokens"] + make_prompt(70, 80 + turn)


def test_mla_is_refused_where_vllm_cannot_begin_in_the_middle(open_engine: Callable[..., Engine]) -> None:
    with pytest.raises(Exception, match="prefix caching is off"):
        open_engine({}, kind="mla", attention_backend="CPU_MLA")


def test_mla_goes_on_from_its_blocks_as_if_it_had_computed_them(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    extra = {"disk": {"path": str(tmp_path), "capacity_bytes": 64 * MiB}, "without_prefix_caching": True}
    options: dict[str, Any] = {"kind": "mla", "attention_backend": "CPU_MLA", "block_size": 16}
    engine = open_engine(extra, **options)
    prompts = [make_prompt(300, seed) for seed in range(6)]
    computed = [engine.ask(prompt) for prompt in prompts]
    blocks = blocks_of(engine, make_prompt(500, 9))

    again = open_engine(extra, **options)
    loaded = [again.ask(prompt) for prompt in prompts]

    assert again.half._engine.layout.shards == 1
    assert blocks_of(again, make_prompt(500, 9)) == blocks
    assert {answer["cached"] for answer in computed} == {0}
    assert {answer["cached"] for answer in loaded} == {288}
    assert_same(loaded, computed)


def blocks_of(engine: Engine, prompt: list[int]) -> bytes:
    """The first 20 blocks of the prompt, all layers, as they lie in the engine while it answers."""
    import torch
    from vllm import SamplingParams

    llm_engine = engine.llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    llm_engine.add_request("r", {"prompt_token_ids": prompt}, sampling)
    found = b""
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
        request = next(iter(engine.scheduler.requests.values()), None)
        if request is not None and request.num_computed_tokens >= len(prompt):
            (ids, *_) = engine.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            pieces = [tensor[ids[:20]].contiguous().view(-1) for tensor in engine.worker._tables[0].keep_alive]
            found = b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)
    engine.settle()
    assert found
    return found


@pytest.mark.skipif(find_smollm2() is None, reason="the real model is not in the cache; run .ci/setup model")
def test_the_real_model_goes_on_in_a_new_process(open_engine: Callable[..., Engine], tmp_path: Path) -> None:
    model = str(find_smollm2())
    prompt = make_prompt(1500, 3)
    disk = {"path": str(tmp_path), "capacity_bytes": 256 * MiB}
    extra = {"host": {"capacity_bytes": 256 * MiB}, "disk": disk, "store": STORE}

    dtype = engine_dtype()
    alone = open_engine(None, model=model, dtype=dtype)
    computed, from_own_cache = alone.ask(prompt, 16), alone.ask(prompt, 16)
    first = open_engine(extra, model=model, dtype=dtype)
    saving = first.ask(prompt, 16)
    first.close()
    with EngineProcess(model, extra, processes=True, options={"dtype": dtype}) as second:
        loading = second.ask(prompt, 16)
        metrics = second.metrics()

    assert_same([saving, loading], [computed, from_own_cache], dtype)
    hit = 1499 // BLOCK * BLOCK
    assert [answer["cached"] for answer in (computed, from_own_cache, saving, loading)] == [0, hit, 0, hit]
    assert metrics["vllm:prompt_tokens_by_source.local_compute"] == 1500 - hit  # the computing really falls away
