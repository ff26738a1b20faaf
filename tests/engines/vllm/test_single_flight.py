"""Of engines that miss the same prompt at the same moment one computes it, the others wait and load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, Engine, EngineProcess, make_prompt
from tests.engines.vllm.test_daemon import Served
from tests.helpers.daemons import wait_until

pytestmark = pytest.mark.timeout(600)
LENGTH = 3000
HIT = (LENGTH - 1) // BLOCK * BLOCK
WAITS: dict[str, Any] = {"store": {"single_flight": True}}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    daemon = Served(tmp_path)
    yield daemon
    daemon.kill()


def test_two_engines_of_a_daemon_compute_a_prompt_once(
    daemon: Served, model_of: Callable[[str], str], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 1)
    extra = {**daemon.extra, **WAITS}
    with EngineProcess(model_of("gqa"), extra) as one, EngineProcess(model_of("gqa"), extra) as two:
        one.ask(make_prompt(40, 2))  # both are warm
        two.ask(make_prompt(40, 3))
        with ThreadPoolExecutor() as threads:
            answers = list(threads.map(lambda engine: engine.ask(prompt), (one, two)))
        waits = [engine.metrics().get("vllm:kvstore_compute_waits", 0) for engine in (one, two)]

    assert [answer["tokens"] for answer in answers] == reference.tokens([prompt]) * 2
    assert sorted(answer["cached"] for answer in answers) == [0, HIT]
    assert sorted(waits) == [0, 1]


def test_an_engine_that_dies_while_it_computes_is_not_waited_for(
    daemon: Served, model_of: Callable[[str], str], reference: Reference
) -> None:
    prompt = make_prompt(LENGTH, 4)
    extra = {**daemon.extra, **WAITS}
    with EngineProcess(model_of("gqa"), extra) as survivor:
        doomed = EngineProcess(model_of("gqa"), extra)
        doomed.ask(make_prompt(40, 2))
        doomed.begin("generate", [prompt], 8)
        wait_until(lambda: daemon.stats()["compute_claims"] >= 2, "the prompt is not being computed")
        doomed.kill()
        doomed.close_pipes()

        answer = survivor.ask(prompt)

    assert answer["tokens"] == reference.tokens([prompt])[0]


def test_requests_of_one_engine_with_a_common_head_do_not_wait(
    open_engine: Callable[..., Engine], reference: Reference
) -> None:
    head = make_prompt(640, 5)
    prompts = [[*head, *make_prompt(100, seed)] for seed in (6, 7, 8)]
    engine = open_engine(WAITS)

    answers = engine.generate(prompts)

    assert [answer["tokens"] for answer in answers] == reference.tokens(prompts)
    assert engine.half.counters["compute_waits"] == 0  # vLLM itself shares the head


def test_the_same_prompt_in_pieces_is_computed_once(open_engine: Callable[..., Engine], reference: Reference) -> None:
    prompts = [make_prompt(1000, 9)] * 3
    engine = open_engine(WAITS, max_num_batched_tokens=256)

    answers = engine.generate(prompts)
    engine.settle()

    assert len({tuple(answer["tokens"]) for answer in answers}) == 1
    assert engine.half.store.stats()["saved_pages"] == 1000 // BLOCK
    assert engine.half.store.stats()["leases"] == 0
