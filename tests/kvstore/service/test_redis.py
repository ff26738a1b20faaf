"""What a daemon does about Redis: asks it when a prompt is explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.service.client import RemoteStore
from kvstore.tiers.redis_local import LocalRedis
from tests.helpers.daemons import Http, LocalDaemon, attach, local_daemon
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import load, open_small, prompt, save, use

pytestmark = NEEDS_REDIS


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def daemon(tmp_path: Path, server: LocalRedis) -> Iterator[LocalDaemon]:
    with local_daemon(
        tmp_path / "kv.sock",
        service={"http_port": 0},
        redis={"url": server.url, "timeout_s": 0.5},
        store={"load_or_recompute": False, "lookup_deadline_s": 0.5},
    ) as daemon:
        yield daemon


@pytest.fixture
def http(daemon: LocalDaemon) -> Http:
    return Http(daemon.daemon.app.port)


@pytest.fixture
def store(daemon: LocalDaemon) -> Iterator[RemoteStore]:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        yield store


def ids(num_blocks: int, seed: int = 0) -> list[int]:
    tokens: list[int] = prompt(num_blocks, seed).tolist()
    return tokens


def elsewhere(server: LocalRedis, num_blocks: int, seed: int) -> None:
    """Another machine saves a prompt, which only Redis has then."""
    with open_small(redis_url=server.url) as other:
        use(other, prompt(num_blocks, seed))
        assert other.flush(5.0)


def test_explain_tells_what_redis_has_and_has_not(http: Http, store: RemoteStore, server: LocalRedis) -> None:
    elsewhere(server, 4, seed=1)

    there = http.post("/v1/explain", tokens=ids(4, 1))
    longer = http.post("/v1/explain", tokens=ids(4, 1) + ids(2, 2))
    unasked = http.post("/v1/explain", tokens=ids(4, 1), timeout_s=0)

    assert (there["reason"], there["by_tier"]) == ("hit", {"redis": 4})
    assert (longer["reason"], longer["known"], longer["asked"]) == ("never_stored", 4, {"redis": False})
    assert longer["text"].endswith("; redis does not have it")
    assert (unasked["reason"], unasked["asked"]) == ("never_stored", {"redis": None})
    assert store.stats()["lookups"] == 0  # asking is no lookup


def test_explain_tells_that_redis_has_not_answered(http: Http, store: RemoteStore, server: LocalRedis) -> None:
    save(store, store.request(prompt(2)))
    server.freeze()
    try:
        explained = http.post("/v1/explain", tokens=ids(4), timeout_s=0.2)
    finally:
        server.thaw()

    assert explained["asked"] == {"redis": None}
    assert explained["text"].endswith("; redis has not answered")
    assert load(store, store.request(prompt(2)))[0] == 2
