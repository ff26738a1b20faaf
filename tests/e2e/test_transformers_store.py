"""The same answers with the store as without, whichever tier is the only one that has the pages.

Compared: with reuse "exact", the logits of every token that is computed after a hit are bit-equal (`torch.equal`) to
those of a run without a store and with the same prefill chunks, and so are the greedy tokens, in fp32 and in bf16.
With reuse "any", logits are equal up to rounding in fp32 and greedy tokens are the same.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectors.transformers import KVCacheModel
from kvstore.config.sections import Config
from kvstore.errors import LayoutMismatch
from kvstore.plan.records import RequestOptions
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32
NEW_TOKENS = 8
ARCHITECTURES = ("llama_gqa", "llama_mha", "llama_mqa", "gemma3", "deepseek_v3", "mistral")
TIERS = ["host", "disk", pytest.param("redis", marks=NEEDS_REDIS)]


@cache
def model_of(name: str, dtype: str = "float32", **fields: Any) -> Any:
    return tiny_model(name, dtype, **fields)


def cold_of(model: Any) -> KVCacheModel:
    """The same code without a store."""
    return KVCacheModel(model, prefill_chunk=CHUNK)


@contextmanager
def opened(
    model: Any,
    disk: Path | None = None,
    redis_url: str | None = None,
    *,
    block_size: int = BLOCK,
    hash_name: str = "sha256",
    host_bytes: int = 4 << 20,
    **options: Any,
) -> Iterator[KVCacheModel]:
    """A model over a store of its own; at the end everything must have been given back."""
    config = Config(
        # Loading is worth it whatever the rates: a tiny model computes faster than it loads.
        store={
            "block_size": block_size,
            "hash": hash_name,
            "load_or_recompute": False,
            "lookup_deadline_s": 10,
            "load_deadline_s": 30,
        },
        host={"capacity_bytes": host_bytes, "huge_pages": False},
        disk={"path": disk, "capacity_bytes": 8 << 20, "workers": 2},
        redis={"url": redis_url, "timeout_s": 10},
    )
    threads = set(threading.enumerate())
    with KVCacheModel.open(model, config, **{"prefill_chunk": CHUNK, **options}) as kv:
        yield kv
        settle(kv)
        stats = kv.connector._store.stats()  # type: ignore[union-attr]
        assert stats["leases"] == stats["pinned_pages"] == stats["slots"]["filling"] == 0
        counters = kv.connector.counters  # type: ignore[union-attr]
        assert counters.load_failures == counters.save_failures == counters.bypassed == 0
    assert set(threading.enumerate()) <= threads


def settle(kv: KVCacheModel) -> None:
    """Wait until all saves are in host memory and written behind."""
    assert kv.flush(WAIT_S)
    assert kv.connector is not None
    assert kv.connector._store.flush(WAIT_S)


def reused(kv: KVCacheModel, ids: list[int], **options: Any) -> dict[str, int]:
    """Ask, wait for the saves, and say where the tokens came from."""
    report = kv.generate(ids, 1, **options).report
    settle(kv)
    return {name: count for name, count in report.sources.items() if count and name != "computed"}


def assert_exact(kv: KVCacheModel, ids: list[int], tier: str, num_reused: int) -> None:
    """Logits after the hit and the greedy answer are bit for bit those of a cold run."""
    cold = cold_of(kv.model)
    expected = cold.prefill(ids, all_logits=True).logits[:, num_reused:]

    got = kv.prefill(ids, all_logits=True)
    answer = kv.generate(ids, NEW_TOKENS)

    assert got.report.by_tier == {tier: num_reused}
    assert torch.equal(got.logits, expected)
    assert answer.report.reused_tokens == num_reused
    assert answer.tokens == cold.generate(ids, NEW_TOKENS).tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_that_alone_has_the_pages_gives_the_bits_of_a_cold_run(
    tier: str, name: str, dtype: str, tmp_path: Path
) -> None:
    model = model_of(name, dtype)
    ids = random_ids(150, seed=1)
    with ExitStack() as stack:
        disk = tmp_path if tier == "disk" else None
        url = stack.enter_context(LocalRedis()).url if tier == "redis" else None
        with opened(model, disk, url) as writer:
            writer.generate(ids, NEW_TOKENS)
            settle(writer)
            if tier == "host":
                assert_exact(writer, ids, "host", 128)
        if tier != "host":
            with opened(model, disk, url) as reader:  # nothing in its host memory
                assert_exact(reader, ids, tier, 128)
                assert sum(reused(reader, ids).values()) == 128


@pytest.mark.parametrize("window", [8, 16, 17, 40, 100])
def test_windows_smaller_equal_and_larger_than_a_block_come_back_from_disk(window: int, tmp_path: Path) -> None:
    model = model_of("gemma3", sliding_window=window)
    ids = random_ids(150, seed=2)
    with opened(model, tmp_path) as writer:
        writer.generate(ids, 1)
    for length, expected in ((150, 128), (129, 128), (128, 96), (97, 96), (40, 32)):
        with opened(model, tmp_path) as reader:
            assert_exact(reader, ids[:length], "disk", expected)


@pytest.fixture(scope="module", params=["llama_gqa", "gemma3", "deepseek_v3"])
def forked(request: pytest.FixtureRequest) -> Iterator[tuple[KVCacheModel, list[int]]]:
    """A model whose store has one long prompt, and that prompt."""
    base = random_ids(200, seed=3)
    with opened(model_of(request.param), host_bytes=16 << 20) as kv:
        kv.generate(base, 1)
        settle(kv)
        yield kv, base


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fork=st.integers(0, 200), length=st.integers(1, 60), seed=st.integers(0, 5))
def test_a_prompt_forked_anywhere_gives_the_bits_of_a_cold_run(
    forked: tuple[KVCacheModel, list[int]], fork: int, length: int, seed: int
) -> None:
    kv, base = forked
    ids = base[:fork] + random_ids(length, seed=100 + seed)
    cold = cold_of(kv.model).prefill(ids, all_logits=True)

    got = kv.prefill(ids, all_logits=True)
    settle(kv)

    hit = got.report.reused_tokens
    assert hit % CHUNK == 0
    assert hit >= min(fork, len(ids) - 1) // CHUNK * CHUNK  # more where an earlier example had the same tail
    assert torch.equal(got.logits, cold.logits[:, hit:])


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "deepseek_v3", "mistral"])
def test_any_reuse_hits_every_block_and_differs_by_rounding_only(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    base = random_ids(120, seed=4)
    cold = cold_of(model)
    with opened(model, tmp_path, reuse="any") as writer:
        answer = writer.generate(base, 40)
    longer = base + answer.tokens + random_ids(9, seed=5)
    with opened(model, tmp_path, reuse="any") as reader:
        for length in (17, 49, 65, 100, 120, 145, 150, len(longer)):
            ids = longer[:length]
            got = reader.prefill(ids, all_logits=True)
            # 120 prompt tokens and 39 of the 40 new ones were in the writer's cache: 9 full blocks.
            assert got.report.reused_tokens == min((length - 1) // BLOCK, 159 // BLOCK) * BLOCK
            expected = cold.prefill(ids, all_logits=True).logits[:, got.report.reused_tokens :]
            torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-4)
            assert reader.generate(ids, NEW_TOKENS).tokens == cold.generate(ids, NEW_TOKENS).tokens


@pytest.mark.parametrize("reuse", ["exact", "any"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_conversation_of_several_turns_reuses_what_came_before(name: str, reuse: str) -> None:
    model = model_of(name)
    cold = cold_of(model)
    history: list[int] = random_ids(70, seed=6)
    seen = []
    with opened(model, reuse=reuse) as kv:
        for turn in range(4):
            answer = kv.generate(history, 20, options=RequestOptions(session="talk"), last_turn=turn == 3)
            settle(kv)
            assert answer.tokens == cold.generate(history, 20).tokens
            seen.append((len(history), answer.report.reused_tokens))
            history = history + answer.tokens + random_ids(25, seed=7 + turn)

    # Exact: what full prefill chunks computed. Any: also what was decoded, up to the last full block.
    if reuse == "exact":
        assert seen == [(70, 0), (115, 64), (160, 96), (205, 160)]
    else:
        assert seen == [(70, 0), (115, 80), (160, 128), (205, 176)]


def test_tenants_never_see_each_others_pages() -> None:
    ids = random_ids(100, seed=8)
    with opened(model_of("llama_gqa")) as kv:
        assert reused(kv, ids, options=RequestOptions(tenant="a")) == {}
        assert reused(kv, ids, options=RequestOptions(tenant="b")) == {}
        assert reused(kv, ids) == {}
        assert reused(kv, ids, options=RequestOptions(tenant="a")) == {"host": 96}


def adapted(strength: float) -> Any:
    """A model with something like a LoRA adapter on one projection."""
    model = tiny_model("llama_gqa")

    class Tuner(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.active_adapters = ["poet"]
            self.scaling = {"poet": strength}

        def forward(self, x: Any) -> Any:
            return self.base_layer(x) * (1 + strength)

    attention = model.model.layers[0].self_attn
    attention.k_proj = Tuner(attention.k_proj)
    return model


@pytest.mark.redis
@pytest.mark.skipif(NEEDS_REDIS[1].args[0], reason=NEEDS_REDIS[1].kwargs["reason"])
def test_on_a_shared_redis_every_other_identity_is_a_miss() -> None:
    ids = random_ids(100, seed=9)
    original = model_of("llama_gqa")
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        "weights": (tiny_model("llama_gqa", seed=1), {}),
        "revision": (original, {"revision": "another"}),
        "dtype": (model_of("llama_gqa", "bfloat16"), {}),
        "heads": (model_of("llama_mha"), {}),
        "model": (model_of("mistral"), {}),
        "rope": (model_of("llama_gqa", rope_theta=5000.0), {}),
        "block size": (original, {"block_size": 32}),
        "salt": (original, {"salt": "other"}),
        "hash": (original, {"hash_name": "xxh3_128"}),
        "chunk": (original, {"prefill_chunk": 48}),
        "reuse": (original, {"reuse": "any"}),
        "adapter": (adapted(0.5), {}),
        "adapter's strength": (adapted(0.25), {}),
    }
    with LocalRedis() as server:
        with opened(original, redis_url=server.url) as kv:
            assert reused(kv, ids) == {}
        for what, (model, options) in others.items():
            with opened(model, redis_url=server.url, **options) as kv:
                assert reused(kv, ids) == {}, what
                assert kv.generate(ids, NEW_TOKENS).tokens == cold_of(model).generate(ids, NEW_TOKENS).tokens, what
        for what, (model, options) in others.items():  # each finds its own again
            with opened(model, redis_url=server.url, **options) as kv:
                assert reused(kv, ids) == {"redis": 96}, what
        with opened(original, redis_url=server.url) as kv:
            assert reused(kv, ids) == {"redis": 96}


def test_on_a_shared_directory_equal_geometry_of_other_weights_is_a_miss_and_other_geometry_is_refused(
    tmp_path: Path,
) -> None:
    ids = random_ids(100, seed=10)
    with opened(model_of("llama_gqa"), tmp_path) as kv:
        assert reused(kv, ids) == {}
    with opened(tiny_model("llama_gqa", seed=1), tmp_path) as kv:
        assert reused(kv, ids) == {}
    with pytest.raises(LayoutMismatch), opened(model_of("llama_gqa", "bfloat16"), tmp_path):
        pass
    with opened(model_of("llama_gqa"), tmp_path) as kv:
        assert reused(kv, ids) == {"disk": 96}


@pytest.mark.parametrize("hash_name", ["sha256", "xxh3_128"])
def test_either_hash_finds_its_pages_again_in_a_new_process(hash_name: str, tmp_path: Path) -> None:
    ids = random_ids(100, seed=11)
    model = model_of("gemma3")
    with opened(model, tmp_path, hash_name=hash_name) as kv:
        assert reused(kv, ids) == {}
    with opened(model, tmp_path, hash_name=hash_name) as kv:
        assert_exact(kv, ids, "disk", 96)


def test_host_memory_too_small_for_a_prompt_still_answers_right(tmp_path: Path) -> None:
    model = model_of("gemma3")
    prompts = [random_ids(180, seed=seed) for seed in (12, 13, 14)]
    cold = cold_of(model)
    # 24 slots; a prompt has 11 blocks of 6 groups. What does not fit is skipped, or loaded as far as there is room.
    with opened(model, tmp_path, host_bytes=24 * 4096) as kv:
        for ids in prompts * 3:
            assert kv.generate(ids, NEW_TOKENS).tokens == cold.generate(ids, NEW_TOKENS).tokens


def test_threads_that_ask_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    model = model_of("llama_gqa")
    shared = random_ids(96, seed=15)
    prompts = [shared + random_ids(20, seed=20 + n) for n in range(6)]
    expected = [cold_of(model).generate(ids, NEW_TOKENS).tokens for ids in prompts]
    answers: dict[int, list[int]] = {}
    with opened(model, tmp_path) as kv:

        def work(first: int) -> None:
            for n in range(first, len(prompts), 2):
                for _ in range(3):
                    answers[n] = kv.generate(prompts[n], NEW_TOKENS).tokens

        threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)

    assert [answers[n] for n in range(len(prompts))] == expected


def test_forgotten_prompts_are_gone_from_every_tier(tmp_path: Path) -> None:
    ids = random_ids(100, seed=30)
    model = model_of("llama_gqa")
    with opened(model, tmp_path) as kv:
        reused(kv, ids)
        assert kv.forget(ids) == 6
        settle(kv)
        assert reused(kv, ids[:50]) == {}
    with opened(model, tmp_path) as kv:
        assert reused(kv, ids) == {"disk": 32}  # what the 50 tokens saved since


def test_array_prompts_hit_what_list_prompts_saved() -> None:
    ids = random_ids(100, seed=31)
    with opened(model_of("llama_gqa")) as kv:
        assert reused(kv, ids) == {}
        for same in (np.array(ids, np.int32), torch.tensor(ids), torch.tensor([ids])):
            report = kv.generate(same, 1).report
            assert report.by_tier == {"host": 96}
