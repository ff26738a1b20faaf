"""Of engines that miss the same prompt at the same moment one computes it, the others wait and load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, STORE, Engine, EngineProcess, make_prompt
from tests.engines.vllm.test_daemon import Served
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
LENGTH = 3000
HIT = (LENGTH - 1) // BLOCK * BLOCK
WAITS: dict[str, Any] = {"store": {**STORE, "single_flight": True}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    daemon = Served(tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.kill()


@pytest.fixture(scope="module")
def pair(daemon: Served, model_of: Callable[[str], str]) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """Two engines of the daemon, both warm. The last test to use them kills the second one."""
    extra = {**daemon.extra, **WAITS}
    two = EngineProcess(model_of("gqa"), extra)
    try:
        with EngineProcess(model_of("gqa"), extra) as one:
            one.ask(make_prompt(40, 2))
            two.ask(make_prompt(40, 3))
            yield one, two
    finally:
        two.kill()
        two.close_pipes()


def test_two_engines_of_a_daemon_compute_a_prompt_once(
    pair: tuple[EngineProcess, EngineProcess], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 1)
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda engine: engine.ask(prompt), pair))
    waits = [engine.metrics().get("vllm:kvstore_compute_waits", 0) for engine in pair]

    reference.check(answers, [prompt] * 2)
    assert sorted(answer["cached"] for answer in answers) == [0, HIT]
    assert sorted(waits) == [0, 1]


def test_an_engine_that_dies_while_it_computes_is_not_waited_for(
    daemon: Served, pair: tuple[EngineProcess, EngineProcess], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 4)
    survivor, doomed = pair
    claims = daemon.stats()["compute_claims"]
    doomed.begin("generate", [prompt], 8)
    wait_until(lambda: daemon.stats()["compute_claims"] > claims, "the prompt is not being computed")
    doomed.kill()

    answer = survivor.ask(prompt)

    reference.check([answer], [prompt])


def test_requests_of_one_engine_with_a_common_head_do_not_wait(
    open_engine: Callable[..., Engine], reference: Reference
) -> None:
    head = make_prompt(640, 5)
    prompts = [[*head, *make_prompt(100, seed)] for seed in (6, 7, 8)]
    engine = open_engine(WAITS)

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert engine.half.counters["compute_waits"] == 0  # vLLM itself shares the head


def test_the_same_prompt_in_pieces_is_computed_once(open_engine: Callable[..., Engine], reference: Reference) -> None:
    prompts = [make_prompt(1000, 9)] * 3
    engine = open_engine(WAITS, max_num_batched_tokens=256)

    answers = engine.generate(prompts)
    engine.settle()

    assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert engine.half.store.stats()["saved_pages"] == 1000 // BLOCK
    assert engine.half.store.stats()["leases"] == 0
