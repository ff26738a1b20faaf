"""Lookups over tiers below host memory: nothing is promised before its bytes are here, and a lookup brings them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectors.sglang_linker.promises import COUNTERS, Promises
from kvstore.base import RequestOptions
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import BLOCK, open_small
from tests.helpers.waiting import wait_until


def names(seed: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{seed} {index}".encode()).digest() for index in range(count)]


def save(store: Any, path: list[bytes]) -> None:
    request = store.request_from_hashes(path, len(path) * BLOCK, RequestOptions(whole=True))
    lease = store.prepare_save(request, 0, len(path))
    for page in lease.pages:
        np.copyto(store.slots.array(page.slot), page.block + 1)
    store.complete(lease)
    assert store.flush(60.0)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Any]:
    """A store that was opened anew: only its disk has pages."""
    store = open_small(tmp_path)
    save(store, names("a", 6))
    store.close()
    opened = open_small(tmp_path)
    yield opened
    opened.close()


def test_what_only_the_disk_has_is_promised_once_it_is_here(on_disk: Any) -> None:
    promises = Promises(on_disk, dict.fromkeys(COUNTERS, 0.0))
    path = names("a", 6)

    wait_until(lambda: promises.lookup("r", path, 0) == 6)

    promise = promises.take("r", path)
    assert promise is not None
    assert promise.lease is not None
    assert [int(on_disk.slots.array(page.slot)[0]) for page in promise.lease.pages] == [1, 2, 3, 4, 5, 6]
    promises.give_back(promise, was_used=True)
    assert on_disk.stats()["leases"] == 0


def test_a_lookup_brings_pages_for_the_next_request_too(on_disk: Any) -> None:
    promises = Promises(on_disk, dict.fromkeys(COUNTERS, 0.0))
    path = names("a", 6)
    promises.lookup("computed at once", path, 0)  # SGLang does not wait, and asks no more for this one

    wait_until(lambda: on_disk.stats()["slots"]["resident"] == 6)

    assert promises.lookup("the next", path, 0) == 6
    promises.clear()


@pytest.fixture
def redis_url() -> Iterator[str]:
    server = LocalRedis()
    server.start()
    yield server.url
    server.stop()


@pytest.mark.redis
@pytest.mark.skipif(NEEDS_REDIS[1].args[0], reason=NEEDS_REDIS[1].kwargs["reason"])
def test_a_shared_tier_that_answers_later_is_not_waited_for_and_brings_its_pages(redis_url: str) -> None:
    first = open_small(redis_url=redis_url)
    path = names("a", 6)
    save(first, path)
    first.close()
    store = open_small(redis_url=redis_url)
    promises = Promises(store, dict.fromkeys(COUNTERS, 0.0))
    try:
        assert promises.lookup("computed at once", path, 0) == 0  # what Redis has is not known yet

        wait_until(lambda: store.stats()["slots"]["resident"] == 6)

        assert promises.lookup("the next", path, 0) == 6
    finally:
        promises.clear()
        store.close()
