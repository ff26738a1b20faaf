"""What can go wrong below KVStoreTier while real engines run: answers are vLLM's own without us, nothing hangs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.testing.redis_server import LocalRedis
from tests.engines.vllm.conftest import fill
from tests.engines.vllm.engine import BLOCK, EngineProcess, make_prompt
from tests.engines.vllm.tier_engine import TierEngine, tier_config
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.timeout(600)
MiB = 1 << 20
PROMPT = make_prompt(700, seed=31)
OTHER = make_prompt(300, seed=32)
FULL = 700 // BLOCK * BLOCK
HASTE = {"lookup_deadline_s": 5.0, "load_deadline_s": 10.0}  # some tests wait for all of it
COMPUTED = "vllm:prompt_tokens_by_source.local_compute"
STORED = "vllm:kvstore_tier_stored_chunks"


@pytest.fixture(autouse=True)
def no_file_is_left() -> None:
    """vLLM keeps sockets and pipes of its own."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> None:
    """The same for threads."""


@pytest.fixture
def open_tier_engine(model_of: Callable[[str], str]) -> Iterator[Callable[..., TierEngine]]:
    """Make an engine in this process; closed at the end, and then no thread of ours is left."""
    current: list[TierEngine] = []

    def make(entry: dict[str, Any]) -> TierEngine:
        current.append(TierEngine(model_of("gqa"), entry))
        return current[-1]

    yield make
    for engine in current:
        engine.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-")] == []


def ask_in_time(engine: TierEngine, prompt: list[int]) -> dict[str, Any]:
    """Ask; an answer that takes longer than any deadline of ours is a hang."""
    started = time.monotonic()
    answer = engine.ask(prompt)
    assert time.monotonic() - started < WAIT_S
    return answer


@pytest.mark.parametrize("_", [pytest.param("", marks=NEEDS_REDIS)])
def test_a_redis_that_freezes_before_a_lookup_or_in_a_load_costs_a_bounded_wait(
    open_tier_engine: Callable[..., TierEngine], reference: Any, _: str
) -> None:
    breaker = {"probe_after_s": 0.2, "probe_max_s": 0.4}
    with LocalRedis() as server:
        redis = {"url": server.url, "timeout_s": 2.0, "connect_timeout_s": 1.0}
        engine = open_tier_engine({"redis": redis, "store": HASTE, "breaker": breaker})
        jobs, load = engine.tier.core.jobs, engine.tier.core.jobs.load
        engine.ask(PROMPT)
        engine.forget()
        assert engine.ask(PROMPT)["cached"] == FULL
        engine.forget()
        try:
            jobs.load = lambda *given: (server.freeze(), load(*given))
            in_load = ask_in_time(engine, PROMPT)
            jobs.load = load
            engine.forget()
            at_lookup = [ask_in_time(engine, prompt) for prompt in (PROMPT, OTHER)]
        finally:
            jobs.load = load
            server.thaw()

        reference.check([in_load, *at_lookup], [PROMPT, PROMPT, OTHER])
        assert [in_load["cached"], *(one["cached"] for one in at_lookup)] == [0, 0, 0]
        assert jobs.counters.lost_loads > 0


def test_an_abort_in_the_middle_of_a_load_leaves_a_sound_engine(
    open_tier_engine: Callable[..., TierEngine], reference: Any, tmp_path: Path
) -> None:
    from vllm import SamplingParams

    engine = open_tier_engine({"disk": {"path": str(tmp_path / "pages"), "capacity_bytes": 32 * MiB}})
    engine.ask(PROMPT)
    engine.forget()
    disk, may_read = engine.tier.core.mover.tier("disk"), threading.Event()
    read_into = disk.read_into
    disk.read_into = lambda *given, **named: may_read.wait(WAIT_S) and read_into(*given, **named)
    llm = engine.llm.llm_engine
    llm.add_request("gone", {"prompt_token_ids": PROMPT}, SamplingParams(temperature=0, max_tokens=8))
    until = time.monotonic() + WAIT_S
    while not engine.tier.core.jobs.has_any and time.monotonic() < until:
        llm.step()
    assert engine.tier.core.jobs.has_any

    llm.abort_request(["gone"])
    llm.step()
    may_read.set()
    answers = [ask_in_time(engine, prompt) for prompt in (PROMPT, OTHER)]

    reference.check(answers, [PROMPT, OTHER])
    engine.settle()
    assert not engine.tier.core.jobs.has_any
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0


def test_a_disk_that_is_full_stores_nothing_and_stores_again_when_it_has_room(
    open_tier_engine: Callable[..., TierEngine], reference: Any, small_mount: Path
) -> None:
    engine = open_tier_engine(
        {"disk": {"path": str(small_mount / "pages"), "capacity_bytes": 8 * MiB}, "breaker": {"probe_after_s": 0.1}}
    )
    os.truncate(small_mount / "pages/pages.slab", 0)  # the reserve is gone ...
    ballast = small_mount / "ballast"
    fill(ballast)  # ... and somebody else took the space

    first = ask_in_time(engine, PROMPT)
    engine.forget()
    second = ask_in_time(engine, PROMPT)
    ballast.unlink()
    wait_until(lambda: engine.tier.core.mover.is_up("disk"))
    engine.forget()
    third = ask_in_time(engine, PROMPT)
    engine.forget()
    fourth = ask_in_time(engine, PROMPT)

    reference.check([first, second, third, fourth], [PROMPT] * 4)
    assert [first["cached"], second["cached"], fourth["cached"]] == [0, 0, FULL]


def test_an_engine_of_several_processes_stores_and_loads(
    open_tier_engine: Callable[..., TierEngine], model_of: Callable[[str], str], reference: Any, tmp_path: Path
) -> None:
    entry = {"disk": {"path": str(tmp_path / "pages"), "capacity_bytes": 32 * MiB}}
    transfer = {"kv_connector": "OffloadingConnector", "kv_connector_module_path": None}
    with EngineProcess(model_of("gqa"), tier_config(entry), processes=True, transfer=transfer) as engine:
        first = engine.ask(PROMPT)
        until = time.monotonic() + WAIT_S
        while engine.metrics().get(STORED, 0) < FULL // BLOCK and time.monotonic() < until:
            engine.ask(OTHER[:40], 1)  # metrics come with answers
        engine.forget_own_cache(True)  # vLLM's host memory too
        computed = engine.metrics()[COMPUTED]
        second = engine.ask(PROMPT)
        computed = engine.metrics()[COMPUTED] - computed
    third = open_tier_engine(entry).ask(PROMPT)

    reference.check([first, second, third], [PROMPT] * 3)
    assert [one["cached"] for one in (first, second, third)] == [0, FULL, FULL]
    assert computed == len(PROMPT) - FULL
