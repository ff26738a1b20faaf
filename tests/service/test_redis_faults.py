"""Redis behind a daemon is killed, frozen and flushed while engines run: no wrong page, no hang, no slot is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.service.client.store import RemoteStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.daemons import DaemonProcess, attach
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import load, prompt, use
from tests.helpers.waiting import wait_until

pytestmark = NEEDS_REDIS

HOST_PAGES = 32  # fewer than the engines use: pages have to come from Redis
IN_TIME_S = 20.0  # far above every deadline, far below a hang


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def daemon(tmp_path: Path, server: LocalRedis) -> Iterator[DaemonProcess]:
    settings = (
        f"redis.url=redis://127.0.0.1:{server.port}",
        "redis.timeout_s=0.3",
        "redis.connect_timeout_s=0.2",
        "breaker.probe_after_s=0.1",
        "breaker.probe_max_s=0.3",
        "store.load_or_recompute=false",
    )
    daemon = DaemonProcess(tmp_path / "kv.sock", None, *settings, host_pages=HOST_PAGES)
    yield daemon
    daemon.kill()


def killed(server: LocalRedis) -> None:
    server.kill()
    time.sleep(0.3)
    server.start()


def frozen(server: LocalRedis) -> None:
    server.freeze()
    time.sleep(0.5)
    server.thaw()


def flushed(server: LocalRedis) -> None:
    with server.client() as client:
        client.flushall()


@pytest.mark.parametrize("fault", [killed, frozen, flushed])
def test_engines_go_on_while_redis_is(
    fault: Callable[[LocalRedis], None], daemon: DaemonProcess, server: LocalRedis
) -> None:
    with attach(daemon.socket) as one, attach(daemon.socket) as two:
        engines = [_Engine(one, 0), _Engine(two, 1), _Engine(two, 2)]
        for _ in range(3):
            _wait_for_requests(engines, 5)
            fault(server)
        _wait_for_requests(engines, 10)
        for engine in engines:
            engine.stop()

        wait_until(lambda: _is_at_rest(one), "leases or slots are left")
        assert sum(one.stats()["slots"].values()) == HOST_PAGES
        assert one.stats()["pinned_pages"] == 0
        if fault is not flushed:  # which is no error: what was there is a miss
            assert any(one.stats()["lane_errors"]["redis"].values())
        # And Redis is used again: what host memory cannot have any more comes from there.
        wait_until(lambda: _comes_from_redis(one), "nothing comes from Redis any more")
        assert max(engine.slowest_s for engine in engines) < IN_TIME_S


class _Engine:
    """Uses prompts it and the others share, comparing every byte, until it is stopped."""

    def __init__(self, store: RemoteStore, number: int) -> None:
        self.num_requests = 0
        self.slowest_s = 0.0
        self.failure: BaseException | None = None
        self._store = store
        self._number = number
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Wait for its last request. Raises what went wrong in it."""
        self._is_over.set()
        self._thread.join(IN_TIME_S)
        assert not self._thread.is_alive()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                began = time.monotonic()
                use(self._store, prompt(1 + self.num_requests % 7, (self._number + self.num_requests) % 12))
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.num_requests += 1
        except BaseException as error:
            self.failure = error


def _wait_for_requests(engines: list[_Engine], count: int) -> None:
    before = [engine.num_requests for engine in engines]

    def is_done() -> bool:
        return all(
            engine.failure is not None or engine.num_requests >= first + count
            for engine, first in zip(engines, before, strict=True)
        )

    wait_until(is_done, "an engine hangs")


def _is_at_rest(store: RemoteStore) -> bool:
    stats = store.stats()
    return bool(stats["leases"] == 0 and stats["slots"]["filling"] == 0)


def _comes_from_redis(store: RemoteStore) -> bool:
    for seed in range(20, 26):
        use(store, prompt(8, seed))
    store.flush(1.0)
    _, match = load(store, store.request(prompt(8, 20)))
    return match.by_tier.get("redis", 0) > 0
