"""What is kept, by use, time to live, priority and promise."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from kvstore.plan.records import RequestOptions
from kvstore.store import LocalStore
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.stores import load, memory_tier, prompt, redis_like, save, store_over, use
from tests.helpers.waiting import WAIT_S, wait_until


def test_a_time_to_live_of_a_request_ends_its_pages(store: LocalStore) -> None:
    request = store.request(prompt(3), RequestOptions(ttl_s=1e-6))
    save(store, request)
    use(store, prompt(3, seed=1))

    assert store.lookup(request).num_blocks == 0
    assert store.lookup(store.request(prompt(3, seed=1))).num_blocks == 3
    assert store.stats()["expired_pages"]["host"] == 3


def test_a_higher_priority_stays_longer(store: LocalStore) -> None:
    use(store, prompt(20, seed=1), RequestOptions(priority=1))
    use(store, prompt(44, seed=2))

    use(store, prompt(30, seed=3))

    assert store.lookup(store.request(prompt(20, seed=1))).num_blocks == 20
    assert store.lookup(store.request(prompt(44, seed=2))).num_blocks == 14


def test_pages_retained_until_a_time_do_not_leave_before_it(store: LocalStore) -> None:
    use(store, prompt(20, seed=1), RequestOptions(retain_until=time.time() + 60))
    use(store, prompt(60, seed=2))

    assert store.lookup(store.request(prompt(20, seed=1))).num_blocks == 20
    assert store.stats()["pinned_pages"] == 20


def test_a_request_may_pin_what_it_saves(store: LocalStore) -> None:
    use(store, prompt(20, seed=1), RequestOptions(pin=True))
    use(store, prompt(60, seed=2))

    assert store.lookup(store.request(prompt(20, seed=1))).num_blocks == 20
    assert store.keep.unpin(store.request(prompt(20, seed=1))) == 20


def test_after_the_last_turn_only_the_shared_part_keeps_its_place(store: LocalStore) -> None:
    shared, ours = prompt(10, seed=1, tail=0), prompt(20, seed=2)
    use(store, np.concatenate([shared, prompt(10, seed=3)]), RequestOptions(session="other"))
    whole = np.concatenate([shared, ours])
    request = store.request(whole, RequestOptions(session="mine"))
    load(store, request)
    save(store, request)
    store.keep.finished(request, finish_reason="stop", last_turn=True)

    use(store, prompt(44, seed=4))  # 20 too many: exactly the private part of the session that is over

    assert store.lookup(store.request(whole)).num_blocks == 10
    other = np.concatenate([shared, prompt(10, seed=3)])
    assert store.lookup(store.request(other)).num_blocks == 20


def test_forgotten_blocks_are_gone_from_every_tier() -> None:
    tier = memory_tier()
    with store_over([tier]) as store:
        request = store.request(prompt(6))
        save(store, request)
        assert store.flush(WAIT_S)

        assert store.keep.forget(request, 2) == 4
        assert store.lookup(request).num_blocks == 2
        wait_until(lambda: len(list(tier[0].scan())) <= 2)
        store.check()

        assert len(list(tier[0].scan())) == 2


def test_a_lookup_right_after_forgetting_finds_nothing() -> None:
    tier, plan = redis_like()
    faulty = FaultyTier(tier)
    with store_over([(faulty, replace(plan, workers=2))]) as store:
        request = store.request(prompt(6))
        save(store, request)
        assert store.flush(WAIT_S)
        store.keep.finished(request)
        faulty.hang(only=("delete",))

        store.keep.forget(request)
        found = store.wait_lookup(store.request(prompt(6)), 5.0).num_blocks
        faulty.recover()

    assert found == 0
