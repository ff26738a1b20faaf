"""The linker seat on a node daemon, whose host memory outlives engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.sglang_linker import promises
from kvstore.config.sections import Config
from tests.engines.sglang.linker.engine import LinkerEngine, prompt
from tests.engines.sglang.linker.worlds import World, play
from tests.helpers.daemons import LocalDaemon, daemon_config
from tests.helpers.waiting import wait_until

TOKENS = prompt(1, 200)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    sections: dict[str, Any] = {"host": {"capacity_bytes": 4 << 20}, "service": {"max_namespaces": 2}}
    return daemon_config(tmp_path / "kv.sock", **sections)  # each rank has a namespace of its own


@pytest.fixture
def daemon(config: Config) -> Iterator[LocalDaemon]:
    started = LocalDaemon(config)
    yield started
    started.stop()


def of_daemon(folder: Path) -> dict[str, Any]:
    return {"service": {"url": f"unix://{folder / 'kv.sock'}", "call_timeout_s": 10.0, "retry_max_s": 0.1}}


def compute(engine: LinkerEngine, tokens: list[int]) -> int:
    """Run a prompt; returns how many tokens of it were loaded."""
    loaded = engine.run(tokens).loaded
    engine.settle()
    engine.flush()
    return loaded


def test_a_restarted_engine_loads_at_once(daemon: LocalDaemon, tmp_path: Path) -> None:
    def scenario(world: World) -> None:
        first = world.engine(of_daemon(world.folder))
        assert compute(first, TOKENS) == 0
        first.close()
        world.engines.remove(first)

        assert compute(world.engine(of_daemon(world.folder)), TOKENS) == 192

    play(scenario, tmp_path)


def test_a_daemon_that_goes_is_a_miss_and_one_that_comes_back_is_used(
    config: Config, daemon: LocalDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises, "LOOK_AGAIN_S", 0.0)
    engine = LinkerEngine(of_daemon(tmp_path))
    try:
        compute(engine, TOKENS)
        asked = engine.match(TOKENS)
        assert asked.promised == 192

        daemon.stop()
        req = engine.admit(TOKENS, asked)
        assert req is not None
        assert not engine.forward(req)
        engine.finish(req)
        engine.settle()
        engine.flush()
        assert req.loaded == 192  # what was promised is still there, the daemon or not
        assert compute(engine, TOKENS) == 0

        again = LocalDaemon(config)
        try:
            wait_until(lambda: engine.core.store.is_attached)
            compute(engine, TOKENS)
            assert compute(engine, TOKENS) == 192
            assert not engine.core.counters["errors"]
        finally:
            engine.close()
            again.stop()
    finally:
        engine.close()


def test_two_ranks_share_a_daemon_and_not_their_pages(daemon: LocalDaemon, tmp_path: Path) -> None:
    def scenario(world: World) -> None:
        engine = world.engine(of_daemon(world.folder))
        assert compute(engine, TOKENS) == 0
        assert compute(engine, TOKENS) == 192  # with its own bytes: the harness has others on each rank

    play(scenario, tmp_path, ranks=2)


def test_ranks_with_the_same_latent_rows_store_them_once(daemon: LocalDaemon, tmp_path: Path) -> None:
    def scenario(world: World) -> None:
        engine = world.engine(of_daemon(world.folder), kind="mla")
        assert compute(engine, TOKENS) == 0
        assert compute(engine, TOKENS) == 192
        assert engine.core.store.stats()["pages"]["host"] == 12

    play(scenario, tmp_path, ranks=2)
