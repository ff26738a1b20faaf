"""A prompt computed by one engine is not computed again by another: from disk, from Redis, in both process models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.testing.redis_server import LocalRedis
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, STORE, Engine, EngineProcess, make_prompt

PROMPTS = [make_prompt(1000, 1), make_prompt(2500, 2)]


@pytest.fixture(scope="module")
def redis() -> Iterator[LocalRedis]:
    server = LocalRedis()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    redis: LocalRedis,
    open_engine: Callable[..., Engine],
    reference: Reference,
) -> Path:
    """A directory of pages, and the Redis server full of the same: all from an engine that is closed by now."""
    folder = tmp_path_factory.mktemp("disk")
    engine = open_engine({"disk": {"path": str(folder), "capacity_bytes": 64 * MiB}, "redis": {"url": redis.url}})
    answers = [engine.ask(prompt) for prompt in PROMPTS]
    reference.check(answers, PROMPTS)
    engine.settle()
    open_engine({})  # closes the one before
    return folder


def disk(folder: Path) -> dict[str, object]:
    return {
        "host": {"capacity_bytes": 64 * MiB, "huge_pages": False},
        "store": STORE,
        "disk": {"path": str(folder), "capacity_bytes": 64 * MiB},
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("tier", "source", "processes"),
    [("disk", "disk", True), ("redis", "external_unspecified", False)],
    ids=["disk, core in another process", "redis, one process"],
)
def test_a_new_process_takes_a_prompt_from_one_tier(
    folder: Path,
    redis: LocalRedis,
    tier: str,
    source: str,
    processes: bool,
    model_of: Callable[[str], str],
    reference: Reference,
) -> None:
    host = {"host": {"capacity_bytes": 64 * MiB, "huge_pages": False}, "store": STORE}
    extra = disk(folder) if tier == "disk" else {**host, "redis": {"url": redis.url}}
    fork_prompt = PROMPTS[0][:600] + make_prompt(60, 30 + processes)
    unknown_prompt = make_prompt(2500, 98 + processes)
    with EngineProcess(model_of("gqa"), extra, processes=processes) as engine:
        engine.ask(unknown_prompt)
        answers = [engine.ask(prompt) for prompt in PROMPTS]
        fork = engine.ask(fork_prompt)
        metrics = engine.metrics()

    reference.check(answers, PROMPTS)
    reference.check([fork], [fork_prompt])
    assert [answer["cached"] for answer in answers] == [999 // BLOCK * BLOCK, 2499 // BLOCK * BLOCK]
    assert fork["cached"] == 600 // BLOCK * BLOCK  # vLLM's own cache by now
    hit = sum(answer["cached"] for answer in answers)
    assert metrics[f"vllm:kvstore_hit_tokens.{tier}"] == hit
    assert metrics[f"vllm:prompt_tokens_cached_by_source.{source}"] == hit  # vLLM's own word for it
    asked = [*PROMPTS, fork_prompt, unknown_prompt]
    computed = sum(map(len, asked)) - hit - fork["cached"]
    assert metrics["vllm:prompt_tokens_by_source.local_compute"] == computed


@pytest.mark.timeout(600)
def test_other_weights_of_the_same_shape_find_nothing(
    folder: Path, tmp_path: Path, open_engine: Callable[..., Engine]
) -> None:
    from tests.engines.vllm.models import make_model

    other = make_model(tmp_path / "other", "gqa", seed=1)

    assert open_engine(disk(folder)).ask(PROMPTS[0])["cached"] > 0
    assert open_engine(disk(folder), model=str(other)).ask(PROMPTS[0])["cached"] == 0
