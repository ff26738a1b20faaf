"""A prompt computed by one engine is not computed again by another: from disk, from Redis, in both process models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers.redis_local import LocalRedis
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, Engine, EngineProcess, make_prompt

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
    answers = engine.generate(PROMPTS)
    assert [answer["tokens"] for answer in answers] == reference.tokens(PROMPTS)
    engine.settle()
    open_engine({})  # closes the one before
    return folder


def disk(folder: Path) -> dict[str, object]:
    return {
        "host": {"capacity_bytes": 64 * MiB, "huge_pages": False},
        "disk": {"path": str(folder), "capacity_bytes": 64 * MiB},
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [False, True], ids=["one process", "core in another process"])
def test_a_new_process_takes_a_prompt_from_disk(
    folder: Path, processes: bool, model_of: Callable[[str], str], reference: Reference
) -> None:
    fork_prompt = PROMPTS[0][:600] + make_prompt(60, 30 + processes)
    with EngineProcess(model_of("gqa"), disk(folder), processes=processes) as engine:
        unknown = engine.ask(make_prompt(2500, 98 + processes))  # the case before saved its own to this folder
        answers = [engine.ask(prompt) for prompt in PROMPTS]
        fork = engine.ask(fork_prompt)
        metrics = engine.metrics()

    assert [answer["tokens"] for answer in answers] == reference.tokens(PROMPTS)
    assert fork["tokens"] == reference.tokens([fork_prompt])[0]
    assert [answer["cached"] for answer in answers] == [999 // BLOCK * BLOCK, 2499 // BLOCK * BLOCK]
    assert fork["cached"] == 600 // BLOCK * BLOCK  # vLLM's own cache by now
    assert metrics["vllm:kvstore_hit_tokens.disk"] == sum(answer["cached"] for answer in answers)
    assert answers[1]["wall_s"] < unknown["wall_s"]  # the computing really falls away


@pytest.mark.timeout(600)
def test_another_replica_takes_a_prompt_from_redis_alone(
    folder: Path, redis: LocalRedis, model_of: Callable[[str], str], reference: Reference
) -> None:
    extra = {"host": {"capacity_bytes": 64 * MiB, "huge_pages": False}, "redis": {"url": redis.url}}
    with EngineProcess(model_of("gqa"), extra) as engine:
        answers = [engine.ask(prompt) for prompt in PROMPTS]
        metrics = engine.metrics()

    assert [answer["tokens"] for answer in answers] == reference.tokens(PROMPTS)
    assert [answer["cached"] for answer in answers] == [999 // BLOCK * BLOCK, 2499 // BLOCK * BLOCK]
    assert metrics["vllm:kvstore_hit_tokens.redis"] == sum(answer["cached"] for answer in answers)


@pytest.mark.timeout(600)
def test_other_weights_of_the_same_shape_find_nothing(
    folder: Path, tmp_path: Path, open_engine: Callable[..., Engine]
) -> None:
    from tests.engines.vllm.models import make_model

    other = make_model(tmp_path / "other", "gqa", seed=1)
    engine = open_engine(disk(folder), kind="gqa")
    assert engine.ask(PROMPTS[0])["cached"] > 0
    engine.close()

    stranger = Engine(str(other), disk(folder))
    try:
        assert stranger.ask(PROMPTS[0])["cached"] == 0
    finally:
        stranger.close()
