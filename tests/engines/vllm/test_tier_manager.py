"""KVStoreTier as vLLM's tiering manager calls it, with a made-up spec and no engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from connectors.vllm_tier import KVStoreTier
from kvstore.errors import ConfigError, LayoutMismatch
from tests.engines.vllm.engine import PATIENCE
from tests.helpers.waiting import WAIT_S

ROW = 8192
CONTEXT = ReqContext("request")
STEP = ScheduleEndContext((), ())
KEYS = [make_offload_key(bytes([number]) * 32, 0) for number in range(4)]


class VllmConfig(SimpleNamespace):
    """Found by name, as vLLM's own is."""


def vllm_config_of(**changes: Any) -> VllmConfig:
    model = SimpleNamespace(dtype="bfloat16", model="nowhere", quantization=None, hf_config=None, max_model_len=64)
    parts = {
        "model_config": model,
        "cache_config": SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto"),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
        "device_config": SimpleNamespace(device_type="cpu"),
    }
    return VllmConfig(**{**parts, **changes})


def spec_of(events: bool = False, **changes: Any) -> SimpleNamespace:
    sizes = SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
    group = SimpleNamespace(group_id=0, tokens_per_block=32, layer_names=("layer.0", "layer.1"))
    config = {
        "groups": (group,),
        "cache": SimpleNamespace(blocks_per_chunk=1),
        "parallel": sizes,
        "model": SimpleNamespace(dtype="bfloat16"),
        "kv_cache_layout": "LBHNC",
        "canonical_layout": False,
        "replicated_layout": False,
    }
    return SimpleNamespace(
        config=SimpleNamespace(**{**config, **changes}),
        kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
    )


@pytest.fixture
def memory() -> np.ndarray[Any, Any]:
    memory = np.zeros((16, ROW), np.int8)
    for row in range(4):
        memory[row] = row + 1
    return memory


@pytest.fixture
def open_tier(tmp_path: Path, memory: np.ndarray[Any, Any]) -> Iterator[Callable[..., KVStoreTier]]:
    opened: list[KVStoreTier] = []

    def open_it(
        spec: Any = None, config: VllmConfig | None = None, view: memoryview | None = None, **given: Any
    ) -> KVStoreTier:
        vllm_config = config or vllm_config_of()  # where the tier looks for it
        entry = {
            "disk": {"path": str(tmp_path / "pages"), "capacity_bytes": "1MiB"},
            "weights": "test",
            "store": PATIENCE,
        }
        tier = KVStoreTier(spec or spec_of(), view or memoryview(memory), "KVStoreTier", **{**entry, **given})
        assert vllm_config is not None
        opened.append(tier)
        return tier

    yield open_it
    for tier in opened:
        tier.shutdown()


def job(number: int, rows: list[int], *, is_load: bool = False, keys: list[Any] | None = None) -> TransferJob:
    return TransferJob(number, keys or KEYS[: len(rows)], np.array(rows, np.int32), is_load, CONTEXT)


def finish(tier: KVStoreTier) -> JobResult:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for result in tier.get_finished_jobs():
            return result
        assert tier.has_pending_work()
        time.sleep(0.001)
    raise AssertionError("no job ended")


def look(tier: KVStoreTier, keys: list[Any]) -> list[LookupResult]:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        answers = [tier.lookup(key, CONTEXT) for key in keys]
        tier.on_schedule_end(STEP)
        if LookupResult.RETRY not in answers:
            return answers
        time.sleep(0.001)
    raise AssertionError("no answer")


def test_rows_that_were_stored_are_loaded_by_the_next_process(
    open_tier: Callable[..., KVStoreTier], memory: np.ndarray[Any, Any]
) -> None:
    first = open_tier()
    first.submit_store(job(1, [0, 1, 2, 3]))
    assert finish(first).success
    first.shutdown()

    second = open_tier()
    assert look(second, KEYS) == [LookupResult.HIT] * 4
    second.submit_load(job(2, [10, 11, 12, 13], is_load=True))
    result = finish(second)

    assert (result.job_id, result.success, result.transfer_bytes) == (2, True, 4 * ROW)
    assert [int(memory[10 + i, ROW - 1]) for i in range(4)] == [1, 2, 3, 4]
    assert not second.has_pending_work()


def test_the_first_answer_of_a_lookup_is_retry(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier()

    assert tier.lookup(KEYS[0], CONTEXT) is LookupResult.RETRY
    assert look(tier, KEYS) == [LookupResult.MISS] * 4


def test_of_a_load_in_part_the_good_chunks_are_named(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier()
    tier.submit_store(job(1, [0, 1]))
    finish(tier)

    tier.submit_load(job(2, [10, 11, 12], is_load=True))
    result = finish(tier)

    assert not result.success
    assert tuple(result.successful_keys or ()) == tuple(KEYS[:2])
    assert look(tier, KEYS[:3]) == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]


def test_a_row_that_is_not_aligned_is_stored_and_loaded_too(open_tier: Callable[..., KVStoreTier]) -> None:
    memory = np.zeros(16 * 5000 + 1, np.int8)[1:].reshape(16, 5000)
    memory[0] = 7
    tier = open_tier(view=memoryview(memory))
    tier.submit_store(job(1, [0]))
    assert finish(tier).success

    tier.submit_load(job(2, [9], is_load=True))

    assert finish(tier).success
    assert (memory[9] == 7).all()
    assert (memory[8] == 0).all()
    assert (memory[10] == 0).all()


def test_drain_leaves_every_result_to_be_taken(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier()
    tier.submit_store(job(1, [0, 1, 2, 3]))
    tier.submit_load(job(2, [10], is_load=True, keys=KEYS[3:]))

    tier.drain_jobs()

    assert {result.job_id for result in tier.get_finished_jobs()} == {1, 2}


def test_hits_are_shown_as_disk() -> None:
    assert KVStoreTier.medium is Medium.STORAGE
    assert KVStoreTier.cache_hit_source is CacheHitSource.DISK


def test_stats_fit_their_definitions(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier()
    tier.submit_store(job(1, [0, 1]))
    finish(tier)

    values = tier.get_stats().data["data"]

    assert values["vllm:kvstore_tier_stored_chunks"] == {("disk",): 2}
    assert set(values) <= set(KVStoreTier.build_metric_definitions({"disk": {"path": "/tmp/pages"}}))
    assert tier.get_stats() is None


def test_events_tell_what_was_stored(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier(spec_of(events=True), enable_kv_events=True)
    tier.submit_store(job(1, [0, 1]))
    finish(tier)

    (event,) = tier.take_events()

    assert event.keys == KEYS[:2]
    assert not event.removed
    assert list(tier.take_events()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model_config": SimpleNamespace(dtype="float16", model="nowhere", quantization=None, hf_config=None)},
        {"model_config": SimpleNamespace(dtype="bfloat16", model="nowhere", quantization="fp8", hf_config=None)},
        {"cache_config": SimpleNamespace(prefix_caching_hash_algo="xxhash", cache_dtype="auto")},
        {"parallel_config": SimpleNamespace(tensor_parallel_size=2)},
    ],
)
def test_chunks_of_another_engine_are_misses(open_tier: Callable[..., KVStoreTier], change: dict[str, Any]) -> None:
    first = open_tier()
    first.submit_store(job(1, [0]))
    finish(first)

    second = open_tier(config=vllm_config_of(**change))

    assert look(second, KEYS[:1]) == [LookupResult.MISS]


def test_other_weights_share_nothing(open_tier: Callable[..., KVStoreTier]) -> None:
    first = open_tier()
    first.submit_store(job(1, [0]))
    finish(first)

    assert look(open_tier(weights="other"), KEYS[:1]) == [LookupResult.MISS]


def test_a_directory_of_another_layout_is_refused(open_tier: Callable[..., KVStoreTier]) -> None:
    open_tier().shutdown()

    with pytest.raises(LayoutMismatch, match="give each layout a directory of its own"):
        open_tier(spec_of(kv_cache_layout="BLHNC"))


def test_wrong_keys_are_refused_with_their_names(open_tier: Callable[..., KVStoreTier]) -> None:
    with pytest.raises(ConfigError, match="unknown key 'reddis'; did you mean 'redis'"):
        open_tier(reddis={"url": "redis://h"})
    with pytest.raises(ConfigError, match="unknown key 'reddis'"):
        KVStoreTier.build_metric_definitions({"type": "KVStoreTier", "reddis": {}})


def test_events_without_vllms_are_refused(open_tier: Callable[..., KVStoreTier]) -> None:
    with pytest.raises(ConfigError, match="kv_events_config is off"):
        open_tier(enable_kv_events=True)


def test_adapters_known_by_name_only_are_refused_unless_vouched_for(open_tier: Callable[..., KVStoreTier]) -> None:
    lora = vllm_config_of(lora_config=SimpleNamespace())

    with pytest.raises(ConfigError, match="adapters_by_name"):
        open_tier(config=lora)
    open_tier(config=lora, adapters_by_name=True)


def test_without_vllms_configuration_it_does_not_start(tmp_path: Path, memory: np.ndarray[Any, Any]) -> None:
    entry = {"disk": {"path": str(tmp_path), "capacity_bytes": "1MiB"}, "weights": "test"}

    with pytest.raises(ConfigError, match="configuration was not found"):
        KVStoreTier(spec_of(), memoryview(memory), "KVStoreTier", **entry)


def test_an_unreachable_redis_is_a_tier_that_is_down_and_no_error(open_tier: Callable[..., KVStoreTier]) -> None:
    tier = open_tier(redis={"url": "redis://127.0.0.1:9", "connect_timeout_s": 0.2})

    tier.submit_store(job(1, [0]))

    assert finish(tier).success
    assert look(tier, KEYS[:2]) == [LookupResult.HIT, LookupResult.MISS]


def test_after_an_error_of_ours_the_job_ends_as_failed(
    open_tier: Callable[..., KVStoreTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()

    def broken(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(tier.core.jobs, "load", broken)
    tier.submit_load(job(5, [10], is_load=True))
    monkeypatch.setattr(tier.core, "lookup", broken)

    (result,) = tier.get_finished_jobs()
    assert (result.job_id, result.success) == (5, False)
    assert tier.lookup(KEYS[0], CONTEXT) is LookupResult.MISS
