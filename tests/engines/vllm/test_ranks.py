"""Tensor parallelism: two ranks in two processes, each with its heads' half of every page, over one slot per page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.answers import assert_same
from tests.engines.vllm.conftest import MiB
from tests.engines.vllm.engine import BLOCK, STORE, EngineProcess, make_prompt
from tests.engines.vllm.test_daemon import Served
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(900)
LENGTH = 700
HIT = (LENGTH - 1) // BLOCK * BLOCK
PROMPTS = [make_prompt(LENGTH, 1), make_prompt(LENGTH, 2)]


def two_ranks(model: str, extra: dict[str, Any] | None) -> EngineProcess:
    return EngineProcess(model, extra, processes=True, options={"tensor_parallel_size": 2})


@pytest.fixture(scope="module")
def expected(model_of: Callable[[str], str]) -> list[list[dict[str, Any]]]:
    """What two ranks answer without us (sums over two halves are not those over the whole): computed, and from vLLM's
    own cache.
    """
    with two_ranks(model_of("gqa"), None) as engine:
        return [[engine.ask(prompt) for prompt in PROMPTS] for _ in range(2)]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    daemon = Served(tmp_path)
    yield daemon
    daemon.kill()


def test_two_ranks_load_what_both_have_saved(
    tmp_path: Path, model_of: Callable[[str], str], expected: list[list[dict[str, Any]]]
) -> None:
    extra: dict[str, Any] = {
        "host": {"capacity_bytes": 64 * MiB, "huge_pages": False},
        "store": STORE,
        "disk": {"path": str(tmp_path), "capacity_bytes": 64 * MiB},
    }
    with two_ranks(model_of("gqa"), extra) as engine:
        cold = [engine.ask(prompt) for prompt in PROMPTS]
        engine.forget_own_cache()
        warm = [engine.ask(prompt) for prompt in PROMPTS]
        metrics = engine.metrics()

    assert_same([*cold, *warm], [*expected[0], *expected[1]])
    assert [answer["cached"] for answer in warm] == [HIT, HIT]
    # Both ranks have copied all of it: a page is 4 layers of K and V of 2 heads of 64, in float32.
    assert metrics["vllm:kvstore_loaded_bytes"] == 2 * HIT * 4 * 2 * 2 * 64 * 4
    assert metrics["vllm:kvstore_hit_tokens.host"] == 2 * HIT
    assert metrics.get("vllm:kvstore_hook_errors", 0) == 0


def test_two_ranks_are_two_shards_of_one_engine_to_a_daemon(
    daemon: Served, model_of: Callable[[str], str], expected: list[list[dict[str, Any]]]
) -> None:
    with two_ranks(model_of("gqa"), daemon.extra) as engine:
        cold = engine.ask(PROMPTS[0])
        wait_until(lambda: daemon.stats()["saved_pages"] == LENGTH // BLOCK)
        engine.forget_own_cache()
        warm = engine.ask(PROMPTS[0])

        daemon.kill()
        engine.forget_own_cache()
        away = engine.ask(PROMPTS[0])
        daemon.start()

        def has_saved() -> bool:
            engine.forget_own_cache()
            engine.ask(PROMPTS[1])
            return bool(daemon.stats()["saved_pages"] >= LENGTH // BLOCK)

        wait_until(lambda: bool(daemon.http.get("/v1/clients")["clients"]))  # it attaches by itself
        wait_until(has_saved)
        engine.forget_own_cache()
        back = engine.ask(PROMPTS[1])

    computed, from_own_cache = expected
    assert_same([cold, warm, away, back], [computed[0], from_own_cache[0], computed[0], from_own_cache[1]])
    assert [a["cached"] for a in (cold, warm, away, back)] == [0, HIT, 0, HIT]
    assert daemon.stats()["leases"] == 0
