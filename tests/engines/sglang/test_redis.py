"""KVStoreBackend with a Redis server below SGLang's host memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.testing.redis_server import LocalRedis
from tests.engines.sglang.backends import NUM, attached, chain, on_disk, page_bytes, restored, store, tokens
from tests.engines.sglang.pools import host_pool
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.waiting import wait_until

pytestmark = NEEDS_REDIS


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    """An empty server."""
    with LocalRedis() as server:
        yield server


def on_redis(server: LocalRedis, **other: Any) -> dict[str, Any]:
    """Extra config of a backend with a server and no directory."""
    extra = on_disk(Path("unused"), **{"redis": {"url": server.url}} | other)
    del extra["disk"]
    return extra


def test_a_page_of_another_element_type_of_half_the_size_is_a_miss(server: LocalRedis) -> None:
    store(host_pool("page_first", torch.bfloat16), on_redis(server))

    assert restored(host_pool("page_first", torch.float8_e4m3fn), on_redis(server)) == (0, [False] * NUM)
    assert restored(host_pool("page_first", torch.bfloat16), on_redis(server)) == (NUM, [True] * NUM)


def test_another_machine_finds_pages_on_the_server_and_keeps_them_on_its_disk(
    server: LocalRedis, tmp_path: Path
) -> None:
    pool = host_pool("page_first")
    before = page_bytes(pool, 0, NUM)
    store(pool, on_redis(server))

    with attached(pool, on_disk(tmp_path, redis={"url": server.url})) as backend:
        assert backend.batch_exists(chain(NUM)) == NUM
        assert backend.batch_get_v1(chain(NUM), tokens(20, NUM)) == [True] * NUM
        wait_until(lambda: backend.core.exchange.num_filled_pages == NUM)  # a close drops what waits
    assert page_bytes(pool, 20, NUM) == before

    assert restored(pool, on_disk(tmp_path)) == (NUM, [True] * NUM)


def test_what_the_disk_lost_comes_from_the_server(server: LocalRedis, tmp_path: Path) -> None:
    pool, both = host_pool("page_first"), on_disk(tmp_path, redis={"url": server.url})
    before = page_bytes(pool, 0, NUM)
    store(pool, both)
    needle = before[2][:64]
    (slab,) = [file for file in tmp_path.rglob("*") if file.is_file() and needle in file.read_bytes()]
    with slab.open("r+b") as file:
        file.seek(slab.read_bytes().index(needle))
        file.write(bytes(64))

    assert restored(pool, both) == (NUM, [True] * NUM)

    assert page_bytes(pool, 20, NUM) == before


def test_a_server_that_answers_no_more_is_a_miss_at_the_deadline(server: LocalRedis) -> None:
    pool = host_pool("page_first")
    extra = on_redis(server, store={"lookup_deadline_s": 0.3, "load_deadline_s": 0.3}, save_deadline_s=0.3)
    with attached(pool, extra) as backend:
        keys = chain(NUM)
        backend.batch_set_v1(keys, tokens(0, NUM))
        before = pool.kv_buffer.clone()
        server.freeze()
        try:
            began = time.monotonic()
            assert backend.batch_exists(keys) == 0
            assert backend.batch_get_v1(keys, tokens(20, NUM)) == [False] * NUM
            assert backend.batch_set_v1(chain(NUM, seed=1), tokens(0, NUM)) == [False] * NUM
            waited_s = time.monotonic() - began
        finally:
            server.thaw()

    assert waited_s < 10
    assert torch.equal(pool.kv_buffer, before)


def test_a_server_that_is_not_there_does_not_keep_sglang_from_starting() -> None:
    gone = {"redis": {"url": "redis://127.0.0.1:1"}}
    extra = on_disk(Path("unused"), **gone)
    del extra["disk"]

    with attached(host_pool("page_first"), extra) as backend:
        assert backend.batch_exists(chain(NUM)) == 0
