"""A delete that was acknowledged holds after kill -9, on every tier; one that was not is owed, told, and done later."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.plan.records import FlushResult
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.redis_server import NEEDS_REDIS, command, wait_until
from tests.helpers.stores import load, memory_tier, open_small, prompt, save, store_over, use

ROOT = Path(__file__).parents[2]
NEEDS_SERVER = NEEDS_REDIS[1]
QUICK = {"probe_after_s": 0.1, "probe_max_s": 0.2}


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


def killed_after(verb: str, directory: Path, *url: str) -> FlushResult:
    """Let a process delete, and kill it when it has said what is acknowledged."""
    command = [sys.executable, "-m", "tests.fault.delete_writer", verb, str(directory), *url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        line = writer.stdout.readline()
        writer.kill()
    return FlushResult(**json.loads(line))


def found(store: LocalStore) -> list[int]:
    """Blocks that are there of prompts 0 to 3."""
    return [load(store, store.request(prompt(4, seed)))[0] for seed in range(4)]


@pytest.mark.parametrize(("verb", "left"), [("forget", [0, 4, 4, 4]), ("clear", [0, 4, 0, 0])])
def test_an_acknowledged_delete_on_disk_holds_after_a_kill(tmp_path: Path, verb: str, left: list[int]) -> None:
    assert killed_after(verb, tmp_path / "kv")

    with open_small(tmp_path / "kv") as store:
        assert found(store) == left


@pytest.mark.redis
@NEEDS_SERVER
@pytest.mark.parametrize(("verb", "left"), [("forget", [0, 4, 4, 4]), ("clear", [0, 4, 0, 0])])
def test_an_acknowledged_delete_in_redis_holds_after_a_kill(
    tmp_path: Path, server: LocalRedis, verb: str, left: list[int]
) -> None:
    assert killed_after(verb, tmp_path / "kv", server.url)

    with open_small(redis_url=server.url) as store:  # what only Redis has
        assert found(store) == left
    with open_small(tmp_path / "kv", server.url) as store:
        assert found(store) == left


@pytest.mark.redis
@NEEDS_SERVER
@pytest.mark.parametrize("verb", ["forget", "clear"])
def test_what_redis_could_not_be_told_to_delete_is_said_and_done_when_it_is_back(server: LocalRedis, verb: str) -> None:
    with open_small(redis_url=server.url, breaker=QUICK, redis={"timeout_s": 1.0}) as store:
        for seed in range(4):
            use(store, prompt(4, seed))
        assert store.flush(10.0)
        server.freeze()

        if verb == "clear":
            store.admin.clear()
        else:
            store.keep.forget(store.request(prompt(4, 0)))
        result = store.flush(5.0)

        assert not result
        assert set(result.undeleted) == {"redis"}
        assert store.stats()["owed_deletes"]["redis"] == (1 if verb == "clear" else 4)
        assert load(store, store.request(prompt(4, 0)))[0] == 0
        server.thaw()
        wait_until(lambda: store.flush(1.0), "the deletes are done")
        assert store.stats()["owed_deletes"]["redis"] == 0
        assert load(store, store.request(prompt(4, 0)))[0] == 0
    with open_small(redis_url=server.url) as store:
        assert load(store, store.request(prompt(4, 0)))[0] == 0


@pytest.mark.redis
@NEEDS_SERVER
def test_pages_that_redis_did_not_get_make_a_flush_false_until_it_has_them(server: LocalRedis) -> None:
    with open_small(redis_url=server.url, breaker=QUICK, redis={"timeout_s": 1.0}) as store:
        server.kill()
        use(store, prompt(4))
        wait_until(lambda: store.stats()["breaker_open"]["redis"] or not store.flush(1.0), "it is noticed")
        result = store.flush(1.0)
        assert not result
        assert sum(result.missing["redis"].values()) == 4
        assert not store.flush(1.0)  # and again: nothing has changed

        server.start()

        wait_until(lambda: store.flush(1.0), "the pages are there")
        assert store.stats()["pages"]["redis"] == 4


@pytest.mark.redis
@NEEDS_SERVER
def test_a_server_that_refuses_writes_makes_every_flush_false(server: LocalRedis) -> None:
    with open_small(redis_url=server.url, breaker=QUICK) as store:
        command(server, "CONFIG", "SET", "maxmemory", "1")
        use(store, prompt(4))

        for _ in range(3):
            result = store.flush(5.0)
            assert not result
            assert sum(result.missing["redis"].values()) == 4

        command(server, "CONFIG", "SET", "maxmemory", "0")
        wait_until(lambda: store.flush(1.0), "the pages are there")


def test_pages_that_left_host_memory_before_they_were_written_make_a_flush_false_once() -> None:
    inner, plan = memory_tier(window_pages=4)
    tier = FaultyTier(inner)
    with store_over([(tier, plan)], num_slots=8) as store:
        tier.hang()
        use(store, prompt(4, 0))
        tier.wait_for_hanging()
        for seed in range(1, 5):
            use(store, prompt(4, seed))
        tier.recover()

        result = store.flush(10.0)

        assert not result
        assert result.missing["memory"]["lost"] == store.stats()["spill_lost"]["memory"] > 0
        assert store.flush(10.0)


def test_closing_says_what_was_not_written_and_not_deleted(caplog: pytest.LogCaptureFixture) -> None:
    inner, plan = memory_tier()
    tier = FaultyTier(inner)
    store = store_over([(tier, plan)])
    use(store, prompt(4, 0))
    assert store.flush(10.0)
    tier.hang(only=("delete",))
    store.keep.forget(store.request(prompt(4, 0)))
    tier.wait_for_hanging()

    with caplog.at_level(logging.WARNING):
        store.close(0.1)
    tier.recover()

    assert "close: not everything is on its tiers: memory: 4 deletes waiting" in caplog.text


def test_closing_waits_for_deletes_that_can_be_done(tmp_path: Path) -> None:
    store = open_small(tmp_path / "kv")
    for seed in range(4):
        use(store, prompt(4, seed))
    store.keep.forget(store.request(prompt(4, 0)))
    store.close()

    with open_small(tmp_path / "kv") as store:
        assert found(store) == [0, 4, 4, 4]


def test_a_prompt_that_is_saved_again_after_it_was_forgotten_is_there_after_a_restart(tmp_path: Path) -> None:
    with open_small(tmp_path / "kv") as store:
        for _ in range(20):
            save(store, store.request(prompt(8, 0)))
            store.keep.forget(store.request(prompt(8, 0)), 2)
        save(store, store.request(prompt(8, 0)))
        assert store.flush(10.0)

    with open_small(tmp_path / "kv") as store:
        assert load(store, store.request(prompt(8, 0)))[0] == 8
