"""The acceptance table of the linker seat (docs/sglang.md): what may happen, on one rank and on two, idle and loaded.

Each test is four rows. What they share is checked at the end of each: SGLang's own sanity check, no slot of the pool
lost, no lease left in the store; and in every forward: every token that was not computed has the bytes of one that was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

from connectors.sglang_linker import promises, start
from kvstore.devices.cpu import CpuDevice
from tests.engines.sglang.linker.devices import MoodyDevice
from tests.engines.sglang.linker.engine import PAGE, LinkerEngine, prompt
from tests.engines.sglang.linker.worlds import World, play
from tests.helpers.waiting import wait_until

HOST = {"host": {"capacity_bytes": "4MiB"}}
Play = Callable[[Callable[[World], None]], None]


@pytest.fixture(params=["tp1", "tp2"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param[2:])


@pytest.fixture(params=["idle", "loaded"])
def is_loaded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "loaded")


@pytest.fixture
def on_all_ranks(ranks: int, is_loaded: bool, tmp_path: Path) -> Play:
    """Runs a scenario on all ranks of an engine."""
    return lambda scenario: play(scenario, tmp_path, ranks=ranks, is_loaded=is_loaded)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> MoodyDevice:
    """Copies into the pools of the engines made from now on."""
    moody = MoodyDevice()
    monkeypatch.setattr(start, "_devices", lambda tensor: (moody, CpuDevice()))
    return moody


def on_disk(world: World) -> dict[str, Any]:
    return {**HOST, "disk": {"path": str(world.folder / "kv"), "capacity_bytes": "64MiB"}}


def store_prompt(world: World, engine: LinkerEngine, tokens: list[int]) -> None:
    """Compute a prompt, and forget it in the pool once it is stored."""
    req = engine.admit(tokens)
    assert req is not None
    world.run(engine, req)
    engine.settle()
    engine.flush()


def test_a_restarted_engine_loads_what_it_stored(on_all_ranks: Play) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        first = world.engine(on_disk(world))
        store_prompt(world, first, tokens)
        first.close()
        world.engines.remove(first)
        world.waiting.clear()

        engine = world.engine(on_disk(world))
        asked = engine.match(tokens)  # only the disk has it: this brings it into host memory
        assert asked.promised < 192
        wait_until(lambda: engine.match(tokens, asked).promised == 192)
        again = engine.admit(tokens)
        assert again is not None
        world.run(engine, again)

        assert again.loaded == 192

    on_all_ranks(scenario)


def test_a_cancelled_load_gives_its_lease_and_its_slots_back(
    on_all_ranks: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine(HOST)
        store_prompt(world, engine, tokens)

        queued = engine.admit(tokens)
        assert queued is not None
        assert queued.loaded == 192
        engine.abort(queued)
        only_asked = engine.match(tokens)
        engine.cache.release_aborted_request(CacheRequestHandle(only_asked.rid, 0))
        monkeypatch.setattr(promises, "LEASE_S", 0.0)  # SGLang does not tell a linker of those; they lapse
        engine.events()

        assert len(engine.core.promises) == 0
        engine.check_leases()
        again = engine.admit(tokens)
        assert again is not None
        world.run(engine, again)
        assert again.loaded == 192

    on_all_ranks(scenario)


def test_a_cleared_cache_waits_for_copies_and_keeps_the_store(on_all_ranks: Play, device: MoodyDevice) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine(HOST)
        req = engine.admit(tokens)
        assert req is not None
        world.run(engine, req)
        engine.flush()  # offloads may be under way: their pages are SGLang's again when this returns
        world.waiting.clear()
        engine.check()
        engine.match(tokens)  # a lease is held now
        queued = engine.admit(prompt(2, 64))
        assert queued is not None
        engine.flush()
        engine.check()

        again = engine.admit(tokens)
        assert again is not None
        world.run(engine, again)
        assert again.loaded == 192

    on_all_ranks(scenario)


def test_restores_at_once_each_get_their_own_pages(on_all_ranks: Play) -> None:
    def scenario(world: World) -> None:
        head = prompt(1, 96)
        prompts = [head + prompt(seed, 70 + seed) for seed in range(2, 7)]
        engine = world.engine(HOST)
        for tokens in prompts:
            store_prompt(world, engine, tokens)

        batch = [engine.admit(tokens) for tokens in prompts]
        world.run(engine, *[req for req in batch if req is not None])

        assert [req.loaded for req in batch if req] == [(len(tokens) - 1) // PAGE * PAGE for tokens in prompts]

    on_all_ranks(scenario)


def test_what_is_promised_is_not_evicted(on_all_ranks: Play) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine({"host": {"capacity_bytes": "160KiB"}})  # 40 pages
        store_prompt(world, engine, tokens)

        asked = engine.match(tokens)
        assert asked.promised == 192
        for seed in range(3, 9):  # more than host memory holds, and more than the pool
            other = engine.admit(prompt(seed, 300))
            assert other is not None
            engine.forward(other)
            engine.finish(other)
            engine.settle()
        engine.evict_all()
        again = engine.admit(tokens, asked)
        assert again is not None
        world.run(engine, again)

        assert again.loaded == 192

    on_all_ranks(scenario)


def test_a_failed_load_aborts_its_requests_and_leaves_nothing_behind(on_all_ranks: Play, device: MoodyDevice) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine(HOST)
        store_prompt(world, engine, tokens)

        req = engine.admit(tokens)
        assert req is not None
        device.fail_in = 0 if world.rank == world.size - 1 else -1  # on one rank alone
        failed = world.run(engine, req)
        device.fail_in = -1

        assert req in failed
        assert engine.core.counters["failed_loads"] == float(device.num_copies > 0 and world.rank == world.size - 1)
        engine.settle()
        engine.core.promises.clear()
        engine.check_leases()
        engine.flush()
        again = engine.admit(tokens)
        assert again is not None
        world.run(engine, again)
        assert again.loaded == 192

    on_all_ranks(scenario)


def test_a_slow_load_is_waited_for_layer_by_layer(on_all_ranks: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.devices.spans.SPAN_BYTES", 1)  # each layer by itself

    def scenario(world: World) -> None:
        slow = MoodyDevice(seed=world.rank)
        monkeypatch.setattr(start, "_devices", lambda tensor: (slow, CpuDevice()))
        tokens = prompt(1, 200)
        engine = world.engine(HOST)
        store_prompt(world, engine, tokens)
        before = slow.num_copies

        for _ in range(3):
            again = engine.admit(tokens)
            assert again is not None
            world.run(engine, again)
            assert again.loaded == 192
            engine.settle()
            engine.flush()

        assert slow.num_copies == before + 3 * 4

    on_all_ranks(scenario)


def test_a_partial_hit_is_as_long_as_every_rank_has_it(on_all_ranks: Play) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine(HOST)
        store_prompt(world, engine, tokens)
        if world.rank == world.size - 1:  # one rank has lost the tail
            core = engine.core
            path = [bytes.fromhex(one) for one in page_hashes(engine, tokens)]
            core.store.keep.forget(core.store.request_from_hashes(path, 192), first=7)
        shorter = engine.admit(tokens[:64] + prompt(2, 10))  # and the pool has a head
        assert shorter is not None
        world.run(engine, shorter)

        req = engine.admit(tokens)
        assert req is not None
        world.run(engine, req)

        assert (req.device, req.loaded) == (64, 7 * PAGE - 64)

    on_all_ranks(scenario)


def test_a_detached_linker_leaves_the_engine_as_it_was(on_all_ranks: Play) -> None:
    def scenario(world: World) -> None:
        tokens = prompt(1, 200)
        engine = world.engine(on_disk(world))
        store_prompt(world, engine, tokens)
        asked = engine.match(tokens)
        req = engine.admit(prompt(2, 100))
        assert req is not None
        world.run(engine, req)  # its offload may be under way
        world.waiting.clear()
        engine.cache.linker.close()
        assert not engine.cache.linker.pending_offloads
        assert len(engine.core.promises) == 0

        without = engine.admit(tokens, asked)  # the engine goes on, and everything is a miss
        assert without is not None
        assert without.loaded == 0
        world.run(engine, without)
        engine.settle()
        assert not engine.core.counters["errors"]
        engine.flush()
        world.waiting.clear()

        engine.attach(on_disk(world))
        wait_until(lambda: engine.match(tokens, asked).promised == 192)
        again = engine.admit(tokens)
        assert again is not None
        world.run(engine, again)
        assert again.loaded == 192

    on_all_ranks(scenario)


def page_hashes(engine: LinkerEngine, tokens: list[int]) -> list[str]:
    """SGLang's hashes of a prompt's whole pages."""
    from array import array

    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    end = len(tokens) // PAGE * PAGE
    hashes: list[str] = get_storage_hash_str(RadixKey(array("q", tokens[:end])), None, page_size=PAGE)
    return hashes
