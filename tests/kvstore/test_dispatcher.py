from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import StoreClosed
from kvstore.plan.records import FlushResult
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.stores import PAGE_BYTES, memory_tier, open_small, prompt, save, store_over, use
from tests.helpers.waiting import WAIT_S


def test_concurrent_loads_of_one_prefix_share_their_fetches() -> None:
    tier = memory_tier()
    with store_over([tier], num_slots=16) as store:
        use(store, prompt(8, seed=1))
        assert store.flush(WAIT_S)
        use(store, prompt(16, seed=2))
        assert store.flush(WAIT_S)
        request = store.request(prompt(8, seed=1))
        leases = [store.prepare_load(request, 8) for _ in range(5)]
        statuses = [store.wait(lease, 5.0) for lease in leases]
        for lease in leases:
            store.complete(lease)
        store.check()

        assert [status.num_blocks for status in statuses] == [8] * 5
        assert store.stats()["lane_bytes"]["memory"]["fetch"] == 8 * PAGE_BYTES


def test_many_threads_always_get_the_right_bytes() -> None:
    tier = memory_tier(capacity_pages=60)
    failures: list[BaseException] = []
    with store_over([tier], num_slots=24) as store:

        def engine(number: int) -> None:
            rng = np.random.default_rng(number)
            try:
                for _ in range(60):
                    shared = prompt(int(rng.integers(1, 8)), seed=0, tail=0)
                    use(store, np.concatenate([shared, prompt(int(rng.integers(1, 6)), int(rng.integers(0, 9)))]))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=engine, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        store.flush(WAIT_S)
        store.check()

        assert not failures
        assert store.stats()["leases"] == 0
        assert store.stats()["pinned_pages"] == 0
        assert store.stats()["slots"]["filling"] == 0


def test_a_closed_store_refuses_work() -> None:
    store = open_small()
    request = store.request(prompt(2))
    store.close()
    store.close()

    with pytest.raises(StoreClosed):
        store.lookup(request)


def test_closing_writes_behind_what_is_left(tmp_path: Path) -> None:
    with open_small(tmp_path) as store:
        save(store, store.request(prompt(50)))
    with open_small(tmp_path) as store:
        assert store.lookup(store.request(prompt(50))).known == 50


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with open_small(tmp_path) as store:
        use(store, prompt(4))

    assert {t for t in threading.enumerate() if t.name.startswith("kvstore")} <= before


def test_who_listens_is_told_of_what_others_may_wait_for() -> None:
    told: list[int] = []
    with store_over([memory_tier()]) as store:
        store.listen(lambda: told.append(len(told)))
        request = store.request(prompt(4))

        store.lookup(request)
        assert told == []
        save(store, request)
        at_the_end_of_the_lease = len(told)
        assert store.flush(WAIT_S)

        assert at_the_end_of_the_lease >= 1
        assert len(told) > at_the_end_of_the_lease  # the outcome of the write behind


def test_a_flush_ends_at_its_deadline_and_at_close() -> None:
    tier, plan = memory_tier()
    faulty = FaultyTier(tier)
    faulty.hang()
    store = store_over([(faulty, plan)])
    save(store, store.request(prompt(4)))
    flushed: list[FlushResult] = []
    waiting = threading.Thread(target=lambda: flushed.append(store.flush(60.0)))
    waiting.start()

    assert not store.flush(0.01)
    store.close(0.1)
    waiting.join(WAIT_S)
    faulty.recover()

    assert not flushed[0]
    assert flushed[0].missing == {"memory": {"waiting": 4}}
