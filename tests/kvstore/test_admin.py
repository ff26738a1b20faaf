from __future__ import annotations

import time

import pytest

from eviction.registry import make_policy
from kvstore.errors import ConfigError, StoreClosed, TierUnavailable
from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.plan.journal import Journal
from kvstore.plan.tier_plan import TierPlan
from kvstore.store import LocalStore
from kvstore.tiers.memory import MemoryTier
from tests.helpers.stores import BLOCK, PAGE_BYTES, load, open_small, prompt, save
from tests.helpers.waiting import WAIT_S


def attach(store: LocalStore, tier: MemoryTier) -> None:
    plan = TierPlan(tier.name, tier.capacity_pages, make_policy("lru"), is_indexed=True, is_shared=False)
    store.admin.attach_tier(Lane(tier, store.slots.view, breaker=Breaker(3, 0.1, 0.2), timeout_s=1.0), plan)


def test_what_was_cleared_is_explained_as_cleared() -> None:
    with open_small() as store:
        store.keep_journal(Journal(time.time))
        request = store.request(prompt(4))
        save(store, request)
        assert store.admin.explain(request).match.num_blocks == 4

        assert store.admin.clear() == 4

        assert store.admin.explain(request).match.num_blocks == 0
        assert load(store, store.request(prompt(4)))[0] == 0
        assert [short.num_tokens for short in store.admin.shortfalls()] == [4 * BLOCK + 1]


def test_fewer_host_slots_keep_fewer_pages_and_more_keep_more() -> None:
    with open_small() as store:
        store.admin.resize_host(2)
        save(store, store.request(prompt(4)))
        assert store.stats()["pages"]["host"] == 2

        store.admin.resize_host(64)

        assert save(store, store.request(prompt(4, seed=1))) == 4


@pytest.mark.parametrize("num_slots", [0, 65])
def test_slots_that_the_slab_does_not_have_are_refused(num_slots: int) -> None:
    with open_small() as store, pytest.raises(ConfigError, match=f"{num_slots} slots are asked for; the slab has 1 to"):
        store.admin.resize_host(num_slots)


def test_a_tier_comes_and_goes_while_requests_run() -> None:
    tier = MemoryTier(16, PAGE_BYTES, name="memory")
    with open_small() as store:
        attach(store, tier)
        save(store, store.request(prompt(4)))
        assert store.flush(WAIT_S)
        assert len(list(tier.scan())) == 4
        store.admin.resize_host(1)  # what is left is in the tier alone

        assert load(store, store.request(prompt(4)))[0] >= 1
        assert store.admin.detach_tier("memory")

        assert "memory" not in store.stats()["lane_bytes"]
        with pytest.raises(TierUnavailable, match="used after close"):
            tier.ping(timeout_s=1.0)
        with pytest.raises(ConfigError, match="there is no tier 'memory'; there are none"):
            store.admin.detach_tier("memory")


def test_a_second_tier_of_one_name_is_refused() -> None:
    with open_small() as store:
        attach(store, MemoryTier(16, PAGE_BYTES, name="memory"))

        with pytest.raises(ConfigError, match="there is a lane 'memory' already"):
            attach(store, MemoryTier(16, PAGE_BYTES, name="memory"))


def test_nothing_is_changed_after_close() -> None:
    store = open_small()
    request = store.request(prompt(1))
    store.close()

    for change in (store.admin.clear, lambda: store.admin.resize_host(1), lambda: store.admin.explain(request)):
        with pytest.raises(StoreClosed):
            change()
