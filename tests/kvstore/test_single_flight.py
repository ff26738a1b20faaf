"""Requests of one store that miss the same blocks, in threads and through a daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.base import KVStore
from kvstore.errors import RequestError, StoreClosed
from kvstore.plan.records import CutReason, Match, RequestOptions
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.daemons import attach, local_daemon
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.stores import open_small, prompt, save, use
from tests.helpers.waiting import WAIT_S, wait_until

TURNS = RequestOptions(single_flight=True)
LEASE = {"compute_wait_s": 60.0}


@pytest.fixture(params=["in process", "through a daemon"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    if request.param == "in process":
        with open_small(store=LEASE) as local:
            yield local
    else:
        with local_daemon(tmp_path / "kv.sock", store=LEASE), attach(tmp_path / "kv.sock") as remote:
            yield remote


class Asking:
    """A lookup in a thread of its own."""

    def __init__(self, look: Callable[[], Match]) -> None:
        self.match: Match | None = None
        self.error: BaseException | None = None
        self._look = look
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def answer(self) -> Match:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        assert self.match is not None
        return self.match

    def _run(self) -> None:
        try:
            self.match = self._look()
        except BaseException as error:
            self.error = error


def waiting(store: KVStore, tokens: Any) -> Asking:
    """A lookup that waits for another request."""
    before = store.stats()["compute_waits"]
    asking = Asking(lambda: store.wait_lookup(store.request(tokens, TURNS)))
    wait_until(lambda: store.stats()["compute_waits"] > before)
    return asking


def test_a_lookup_waits_until_the_blocks_are_published(store: KVStore) -> None:
    first = store.request(prompt(8), TURNS)
    assert store.wait_lookup(first).num_blocks == 0
    asking = waiting(store, prompt(8))

    save(store, first)
    match = asking.answer()

    assert match.num_blocks == 8
    assert match.compute_wait_s > 0.0


def test_it_goes_on_waiting_after_a_part_is_there(store: KVStore) -> None:
    first = store.request(prompt(8), TURNS)
    store.wait_lookup(first)
    asking = waiting(store, prompt(8))

    save(store, first, 0, 5)
    half = store.lookup(store.request(prompt(8), TURNS))
    save(store, first, 5, 3)

    assert (half.num_blocks, half.pending, half.cut) == (5, True, CutReason.COMPUTING)
    assert asking.answer().num_blocks == 8


def test_the_end_of_a_request_that_saved_nothing_ends_the_wait(store: KVStore) -> None:
    first = store.request(prompt(8), TURNS)
    store.wait_lookup(first)
    asking = waiting(store, prompt(8))

    store.keep.finished(first)

    assert asking.answer().num_blocks == 0


def test_a_wait_of_the_callers_own_length_ends_with_what_there_is(store: KVStore) -> None:
    store.wait_lookup(store.request(prompt(8), TURNS))

    match = store.wait_lookup(store.request(prompt(8), TURNS), 0.05)

    assert (match.num_blocks, match.pending, match.cut) == (0, True, CutReason.COMPUTING)


def test_a_peek_neither_waits_nor_claims_nor_counts(store: KVStore) -> None:
    use(store, prompt(4))
    first = store.request(prompt(8), TURNS)
    assert store.peek(first).num_blocks == 4

    assert store.wait_lookup(store.request(prompt(8), TURNS)).num_blocks == 4
    peeked = store.peek(store.request(prompt(8), TURNS))

    assert (peeked.num_blocks, peeked.pending) == (4, False)
    assert store.stats()["lookups"] == 2


def test_requests_without_the_option_wait_for_nobody(store: KVStore) -> None:
    store.wait_lookup(store.request(prompt(8), TURNS))

    match = store.wait_lookup(store.request(prompt(8)))

    assert (match.num_blocks, match.pending) == (0, False)


@pytest.mark.parametrize("step_blocks", [0, -1, 1.5, "4"])
def test_steps_that_are_no_number_of_blocks_are_refused(store: KVStore, step_blocks: Any) -> None:
    with pytest.raises(RequestError, match="step_blocks"):
        store.request(prompt(4), RequestOptions(single_flight=True, step_blocks=step_blocks))


def test_a_lease_that_ends_wakes_who_waits() -> None:
    with open_small(store={"compute_wait_s": 0.2}) as store:
        store.wait_lookup(store.request(prompt(8), TURNS))

        match = store.wait_lookup(store.request(prompt(8), TURNS))

    assert not match.pending
    assert match.compute_wait_s >= 0.2


def test_a_store_that_closes_ends_all_waits() -> None:
    store: LocalStore = open_small(store=LEASE)
    store.wait_lookup(store.request(prompt(8), TURNS))
    asking = waiting(store, prompt(8))

    store.close()

    with pytest.raises(StoreClosed):
        asking.answer()


def test_a_client_that_leaves_is_not_waited_for(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock", store=LEASE), attach(tmp_path / "kv.sock") as store:
        leaving = attach(tmp_path / "kv.sock")
        leaving.wait_lookup(leaving.request(prompt(8), TURNS))
        asking = waiting(store, prompt(8))

        began = time.monotonic()
        leaving.close()

        assert not asking.answer().pending
        assert time.monotonic() - began < LEASE["compute_wait_s"] / 2


class TestTwoStoresOnOneRedis:
    pytestmark = NEEDS_REDIS

    @pytest.fixture
    def redis(self) -> Iterator[LocalRedis]:
        with LocalRedis() as server:
            yield server

    @pytest.fixture
    def stores(self, redis: LocalRedis) -> Iterator[tuple[LocalStore, LocalStore]]:
        settings = LEASE | {"lookup_deadline_s": 5.0, "load_or_recompute": False}
        with (
            open_small(redis_url=redis.url, store=settings) as here,
            open_small(redis_url=redis.url, store=settings) as there,
        ):
            yield here, there

    def test_one_computes_and_the_other_loads_it_from_redis(self, stores: tuple[LocalStore, LocalStore]) -> None:
        here, there = stores
        first = here.request(prompt(8), TURNS)
        here.wait_lookup(first)
        asking = waiting(there, prompt(8))

        save(here, first, 0, 3)
        save(here, first, 3, 5)

        assert asking.answer().by_tier == {"redis": 8}

    def test_what_is_given_up_is_free_for_the_other(self, stores: tuple[LocalStore, LocalStore]) -> None:
        here, there = stores
        first = here.request(prompt(8), TURNS)
        here.wait_lookup(first)
        asking = waiting(there, prompt(8))

        here.keep.finished(first)

        assert asking.answer().num_blocks == 0
        assert there.stats()["compute_claims"] == 1

    def test_a_redis_that_dies_ends_the_wait(self, redis: LocalRedis, stores: tuple[LocalStore, LocalStore]) -> None:
        here, there = stores
        here.wait_lookup(here.request(prompt(8), TURNS))
        asking = waiting(there, prompt(8))

        began = time.monotonic()
        redis.stop()

        assert not asking.answer().pending
        assert time.monotonic() - began < LEASE["compute_wait_s"] / 2
