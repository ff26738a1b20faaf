"""What can go wrong below while requests run: every answer is vLLM's own without us, and the engine lives on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.plan.journal import Left
from kvstore.testing.redis_server import LocalRedis
from tests.engines.vllm.conftest import MiB, Reference, fill
from tests.engines.vllm.engine import BLOCK, PAGE_BYTES, Engine, make_prompt
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.timeout(600)
LENGTH = 700
HIT = (LENGTH - 1) // BLOCK * BLOCK
HASTE = {"lookup_deadline_s": 5.0, "load_deadline_s": 10.0, "load_or_recompute": False}  # some tests wait for all of it


@pytest.fixture(scope="module")
def redis() -> Iterator[LocalRedis]:
    server = LocalRedis()
    server.start()
    yield server
    server.stop()


def answer_is_right(engine: Engine, reference: Reference, prompt: list[int]) -> dict[str, Any]:
    started = time.monotonic()
    answer = engine.ask(prompt)
    assert time.monotonic() - started < WAIT_S  # no wait without a bound
    reference.check([answer], [prompt])
    assert engine.scheduler.connector._hook_errors == 0
    return answer


def drop_host(engine: Engine) -> None:
    """Leave pages in the lower tiers only, as a restart would."""
    engine.forget_own_cache()
    planner = engine.half.store._planner
    with engine.half.store._lock:
        for page in list(planner.books.catalog.pages()):
            if page.state == 2 or getattr(page.state, "name", "") == "READY":
                planner.books.host.drop((page,), Left.EVICTED)  # tiers that are owed it hear of it


class TestRedis:
    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], redis: LocalRedis) -> Engine:
        extra = {
            "redis": {"url": redis.url, "timeout_s": 2.0, "connect_timeout_s": 1.0},
            "store": HASTE,
            "breaker": {"probe_after_s": 0.2, "probe_max_s": 0.4},
        }
        return open_engine(extra)

    def stored(self, engine: Engine, seed: int) -> list[int]:
        prompt = make_prompt(LENGTH, seed)
        engine.ask(prompt)
        drop_host(engine)
        return prompt

    def test_pages_come_from_redis_when_all_is_well(self, engine: Engine, reference: Reference) -> None:
        assert answer_is_right(engine, reference, self.stored(engine, 1))["cached"] == HIT

    def test_the_server_is_asked_once_however_often_vllm_asks(
        self, engine: Engine, redis: LocalRedis, reference: Reference
    ) -> None:
        prompt = self.stored(engine, 7)
        asked_again = engine.half.counters["asked_again"]
        redis.client().config_resetstat()
        redis.freeze()
        thaw = threading.Timer(0.1, redis.thaw)
        thaw.start()
        answer_is_right(engine, reference, prompt)
        thaw.join()

        assert redis.client().info("commandstats")["cmdstat_exists"]["calls"] == HIT // BLOCK
        assert engine.half.counters["asked_again"] - asked_again > 5

    def test_a_flushed_server_is_a_miss(self, engine: Engine, redis: LocalRedis, reference: Reference) -> None:
        prompt = self.stored(engine, 2)
        redis.client().flushall()

        assert answer_is_right(engine, reference, prompt)["cached"] == 0

    def test_a_page_that_goes_between_lookup_and_load_shortens_the_hit(
        self, engine: Engine, redis: LocalRedis, reference: Reference
    ) -> None:
        prompt = self.stored(engine, 3)
        half, client = engine.half, redis.client()
        prepare_load = half.store.prepare_load

        def flush_first(*arguments: Any, **keywords: Any) -> Any:
            client.flushall()
            return prepare_load(*arguments, **keywords)

        half.store.prepare_load = flush_first
        try:
            assert answer_is_right(engine, reference, prompt)["cached"] == 0
        finally:
            half.store.prepare_load = prepare_load

    def test_a_frozen_server_costs_a_bounded_wait(
        self, engine: Engine, redis: LocalRedis, reference: Reference
    ) -> None:
        prompt = self.stored(engine, 4)
        redis.freeze()
        try:
            assert answer_is_right(engine, reference, prompt)["cached"] == 0
        finally:
            redis.thaw()

        counters = engine.half.counters
        # Waiting with nothing to compute costs the scheduler nothing: it is a rest, and told apart from our hooks.
        assert counters["rest_seconds"] > counters["hook_seconds"] > 0

    def test_a_killed_server_is_a_miss(self, engine: Engine, redis: LocalRedis, reference: Reference) -> None:
        prompt = self.stored(engine, 5)
        redis.kill()

        assert answer_is_right(engine, reference, prompt)["cached"] == 0
        assert answer_is_right(engine, reference, make_prompt(LENGTH, 6))["cached"] == 0


class TestDisk:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("disk")

    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], folder: Path) -> Engine:
        disk = {"path": str(folder), "capacity_bytes": 64 * PAGE_BYTES, "shared": False}
        return open_engine({"disk": disk, "store": HASTE})

    def test_a_flipped_byte_in_every_page_is_a_miss(self, engine: Engine, folder: Path, reference: Reference) -> None:
        prompt = make_prompt(LENGTH, 11)
        engine.ask(prompt)
        drop_host(engine)
        slab = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        data = bytearray(slab.read_bytes())
        for position in range(5000, len(data), 4096):
            data[position] ^= 0x10
        with slab.open("r+b") as file:
            file.write(data)
            os.fsync(file.fileno())

        assert answer_is_right(engine, reference, prompt)["cached"] == 0
        assert engine.half.store.stats()["corrupt_pages"]["disk"] > 0

    def test_a_full_disk_keeps_what_fits(self, engine: Engine, reference: Reference) -> None:
        prompts = [make_prompt(LENGTH, 20 + seed) for seed in range(6)]  # 22 pages each, room for 64
        for prompt in prompts:
            answer_is_right(engine, reference, prompt)
        drop_host(engine)

        cached = [answer_is_right(engine, reference, prompt)["cached"] for prompt in reversed(prompts)]

        assert cached[0] == HIT  # the newest is there, the oldest had to go
        assert 0 in cached


def test_a_disk_without_room_stores_nothing_and_stores_again_when_it_has_some(
    open_engine: Callable[..., Engine], reference: Reference, small_mount: Path
) -> None:
    disk = {"path": str(small_mount / "pages"), "capacity_bytes": 8 * MiB}
    engine = open_engine({"disk": disk, "store": HASTE, "breaker": {"probe_after_s": 0.1}})
    slab = max((small_mount / "pages").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(slab, 0)  # the reserve is gone ...
    ballast = small_mount / "ballast"
    fill(ballast)  # ... and somebody else took the space
    prompt = make_prompt(LENGTH, 51)

    answer_is_right(engine, reference, prompt)
    drop_host(engine)
    assert answer_is_right(engine, reference, prompt)["cached"] == 0
    ballast.unlink()
    wait_until(lambda: not engine.half.store.stats()["breaker_open"]["disk"])
    drop_host(engine)
    answer_is_right(engine, reference, prompt)
    drop_host(engine)

    assert answer_is_right(engine, reference, prompt)["cached"] == HIT


@pytest.mark.parametrize(("kind", "mode"), [("gqa", "async"), ("gqa", "sync"), ("sliding", "async")])
def test_a_copy_that_fails_is_computed_and_not_offered_again(
    open_engine: Callable[..., Engine], reference: Reference, kind: str, mode: str
) -> None:
    engine = open_engine({"load": mode}, kind=kind)
    prompt = make_prompt(LENGTH, 31)
    engine.ask(prompt)
    engine.forget_own_cache()
    device = engine.worker._device

    def fail(*_: object) -> None:
        raise RuntimeError("no copy today")

    device.copy_in = fail
    try:
        answer = engine.ask(prompt)
    finally:
        del device.copy_in

    reference.check([answer], [prompt], kind=kind)
    assert engine.half.counters["load_failures"] == 1
    engine.forget_own_cache()
    assert engine.ask(prompt)["tokens"] == answer["tokens"]
    assert engine.half.store.stats()["leases"] == 0


def test_an_exception_of_ours_does_not_reach_the_engine(
    open_engine: Callable[..., Engine], reference: Reference
) -> None:
    engine = open_engine({})
    prompt = make_prompt(LENGTH, 41)
    engine.ask(prompt)
    engine.forget_own_cache()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    for name in ("matched", "allocated", "request_finished", "new_request"):
        engine.forget_own_cache()
        original = getattr(engine.half, name)
        setattr(engine.half, name, fail)
        try:
            reference.check([engine.ask(prompt)], [prompt])
        finally:
            setattr(engine.half, name, original)

    assert engine.scheduler.connector._hook_errors > 0
    reference.check([engine.ask(prompt)], [prompt])
