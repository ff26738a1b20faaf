"""A store over tiers that refuse one kind of call: what they still do goes on, and the rest comes back by itself."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_server import NEEDS_REDIS, command
from tests.helpers.stores import PAGE_BYTES, open_small, prompt, use
from tests.helpers.waiting import wait_until

BLOCKS = 4
PROMPTS = 6
FRESH = 24  # blocks that a request saves anew: more batches than it takes to open a breaker
SECTIONS: dict[str, Any] = {
    "host": {"capacity_bytes": 48 * PAGE_BYTES, "huge_pages": False},  # small: hits come from below
    "breaker": {"failures_to_open": 3, "probe_after_s": 0.05, "probe_max_s": 0.2},
    "store": {
        "lane_batch_pages": 8,
        "load_or_recompute": False,
        "lookup_deadline_s": 20.0,  # the machine may be busy
        "load_deadline_s": 20.0,
    },
}


def needs_redis(test: Any) -> Any:
    for mark in NEEDS_REDIS:
        test = mark(test)
    return test


def rounds(store: LocalStore, first: int, num_rounds: int = 12) -> int:
    """Requests that load what was stored before and save something new; returns how many loaded all of it."""
    hits = 0
    for number in range(first, first + num_rounds):
        hits += use(store, prompt(BLOCKS, seed=number % PROMPTS)) == BLOCKS
        use(store, prompt(FRESH, seed=1000 + number))
    return hits


def open_redis(url: str, **store: Any) -> LocalStore:
    sections = {**SECTIONS, "store": {**SECTIONS["store"], **store}}
    return open_small(None, url, **sections, redis={"timeout_s": 20.0, "connect_timeout_s": 10.0})


def open_disk(path: Path) -> LocalStore:
    disk = {"path": path, "capacity_bytes": 512 * PAGE_BYTES, "workers": 2, "timeout_s": 20.0}
    return open_small(None, None, **SECTIONS, disk=disk)


def is_out(store: LocalStore, tier: str, way: str) -> Callable[[], bool]:
    return lambda: bool(store.stats()["direction_open"][tier][way])


# ---- Redis -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(arguments=("--enable-protected-configs", "yes")) as server:
        yield server


@pytest.fixture
def warm(server: LocalRedis) -> LocalRedis:
    """A server that has the prompts."""
    with closing(open_redis(server.url)) as store:
        for seed in range(PROMPTS):
            use(store, prompt(BLOCKS, seed=seed))
        assert store.flush(30.0)
    return server


def read_only(server: LocalRedis) -> tuple[str, Callable[[], object]]:
    command(server, "CONFIG", "SET", "replica-serve-stale-data", "yes")
    command(server, "REPLICAOF", "127.0.0.1", "1")
    return server.url, lambda: command(server, "REPLICAOF", "NO", "ONE")


def unsaved(server: LocalRedis) -> tuple[str, Callable[[], object]]:
    command(server, "CONFIG", "SET", "save", "3600 1")
    command(server, "CONFIG", "SET", "dir", "/proc/self")  # snapshots cannot be written there
    command(server, "BGSAVE")
    wait_until(lambda: command(server, "INFO", "persistence")["rdb_last_bgsave_status"] == "err")
    return server.url, lambda: command(server, "CONFIG", "SET", "stop-writes-on-bgsave-error", "no")


def without_replicas(server: LocalRedis) -> tuple[str, Callable[[], object]]:
    command(server, "CONFIG", "SET", "min-replicas-to-write", "1")
    return server.url, lambda: command(server, "CONFIG", "SET", "min-replicas-to-write", "0")


def account(server: LocalRedis, *rules: str) -> str:
    command(server, "ACL", "SETUSER", "app", "reset", "on", ">secret", "~*", *rules)
    return server.url.replace("://", "://app:secret@")


def may_only_read(server: LocalRedis) -> tuple[str, Callable[[], object]]:
    url = account(server, "+@read", "+@connection", "+@keyspace", "-@write")
    return url, lambda: account(server, "+@all")


def may_not_set(server: LocalRedis) -> tuple[str, Callable[[], object]]:
    return account(server, "+@all", "-set"), lambda: account(server, "+@all")


KINDS = {
    "READONLY": read_only,
    "MISCONF": unsaved,
    "NOREPLICAS": without_replicas,
    "NOPERM": may_only_read,
}


@needs_redis
@pytest.mark.parametrize("reason", KINDS)
def test_while_redis_refuses_writes_every_hit_is_had_and_writes_come_back(
    warm: LocalRedis, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    url, lift = KINDS[reason](warm)
    with closing(open_redis(url)) as store:
        assert rounds(store, 0) == 12

        stats = store.stats()
        assert stats["refusals"]["redis"]["write"][reason] >= 3
        assert stats["breaker_open"]["redis"] == 0
        assert not is_out(store, "redis", "read")()
        assert "write is left out, the rest goes on: tier redis: spill of 8 pages: TierRefused: redis 127.0.0.1" in (
            caplog.text
        )
        assert reason in caplog.text

        lift()
        written = stats["spilled_pages"]["redis"]
        wait_until(lambda: not is_out(store, "redis", "write")())
        use(store, prompt(FRESH, seed=77))
        wait_until(lambda: store.stats()["spilled_pages"]["redis"] > written)
        assert "write is back" in caplog.text
        assert store.stats()["down_reasons"]["redis"].get("write") is None


@needs_redis
def test_an_account_that_may_only_write_writes(server: LocalRedis) -> None:
    url = account(server, "+set", "+multi", "+exec", "+ping")
    with closing(open_redis(url)) as store:
        for seed in range(PROMPTS):
            use(store, prompt(BLOCKS, seed=seed))
        wait_until(lambda: store.stats()["spilled_pages"]["redis"] == PROMPTS * BLOCKS)
        stats = store.stats()

    assert stats["direction_open"]["redis"] == {"read": 1, "write": 0, "touch": 0, "delete": 0, "claim": 0}
    assert "may not run EXISTS" in stats["down_reasons"]["redis"]["read"]
    assert stats["breaker_open"]["redis"] == 1  # no pages are asked of it
    with closing(open_redis(server.url)) as store:
        assert [use(store, prompt(BLOCKS, seed=seed)) for seed in range(PROMPTS)] == [BLOCKS] * PROMPTS


@needs_redis
@pytest.mark.parametrize(
    ("denied", "way"), [("-unlink", "delete"), ("-pexpire -touch", "touch"), ("-eval", "claim"), ("-set", "write")]
)
def test_one_kind_of_command_that_is_denied_leaves_the_others(warm: LocalRedis, denied: str, way: str) -> None:
    url = account(warm, "+@all", *denied.split())
    with closing(open_redis(url, touch_interval_s=0.0)) as store:
        assert rounds(store, 0) == 12
        if way == "delete":
            for seed in range(4):
                store.keep.forget(store.request(prompt(BLOCKS, seed=1000 + seed)))
        stats = store.stats()

    others = {name: is_open for name, is_open in stats["direction_open"]["redis"].items() if name != way}
    assert not any(others.values())
    if way != "write":
        assert stats["spilled_pages"]["redis"] > 0


# ---- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_while_the_disk_refuses_writes_every_hit_is_had_and_writes_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with closing(open_disk(tmp_path)) as store:
        for seed in range(PROMPTS):
            use(store, prompt(BLOCKS, seed=seed))
        assert store.flush(30.0)
        before = store.stats()["spilled_pages"]["disk"]
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> int:
                raise OSError(code, os.strerror(code))

            patch.setattr(os, "pwritev", refuse)
            assert rounds(store, 0) == 12
            stats = store.stats()

        assert stats["direction_open"]["disk"]["read"] == 0
        assert stats["spilled_pages"]["disk"] == before
        if code in (errno.EROFS, errno.EIO):  # the others are a full disk, which is an answer
            assert stats["refusals"]["disk"]["write"][errno.errorcode[code]] >= 3
        wait_until(lambda: not is_out(store, "disk", "write")())
        use(store, prompt(FRESH, seed=78))
        wait_until(lambda: store.stats()["spilled_pages"]["disk"] > before)


def test_while_the_disk_gives_no_page_it_still_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_disk(tmp_path)) as store:
        for seed in range(PROMPTS):
            use(store, prompt(BLOCKS, seed=seed))
        assert store.flush(30.0)

        def refuse(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", refuse)
        rounds(store, 0)
        before = store.stats()["spilled_pages"]["disk"]
        use(store, prompt(FRESH, seed=79))

        wait_until(lambda: store.stats()["spilled_pages"]["disk"] > before)
        assert not is_out(store, "disk", "write")()
