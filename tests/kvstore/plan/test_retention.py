"""What is kept: by use, time to live and priority, and by promises, of which each has an end and all a budget."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings, RequestOptions
from kvstore.plan.retention import MAX_STALE, Kept
from kvstore.plan.state import Block, Page
from kvstore.store import LocalStore
from radix.hashing import BlockHash
from tests.helpers.clocks import Clocks
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.planners import LAYOUT
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


# ---- promises --------------------------------------------------------------------------------------------------

INF = float("inf")


class Shelf:
    """Host memory of ten slots, of which five may be kept, for at most a hundred seconds."""

    def __init__(self) -> None:
        self.clocks = Clocks(now=0.0, unix=0.0)
        settings = PlanSettings(10, max_pinned_fraction=0.5, pin_max_s=100.0)
        planner = Planner(LAYOUT, settings, make_policy("lru"), clock=self.clocks)
        self.catalog, self.host = planner.books.catalog, planner.books.host
        self.keeper = planner.retention.keeper
        self._count = 0

    def blocks(self, num_blocks: int) -> list[Block]:
        """A path whose pages are all in host memory."""
        keys = []
        for _ in range(num_blocks):
            self._count += 1
            keys.append(BlockHash(self._count.to_bytes(32, "big")))
        blocks = self.catalog.insert(keys)
        pages: list[Page] = [page for block in blocks for page in block.pages]
        self.host.take_for(pages, ())
        self.host.ready(pages)
        self.host.enter(pages, used=False)
        return blocks

    def expire(self, at: float) -> None:
        """Let time pass until `at`, and end what is over then."""
        self.clocks.advance(at - self.clocks.boot())
        self.keeper.expire()

    @property
    def num_pinned(self) -> int:
        self.keeper.check()
        return self.host.num_resident - len(self.host.policy)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_of_a_path_larger_than_the_budget_the_head_is_kept(shelf: Shelf) -> None:
    path = shelf.blocks(8)

    assert shelf.keeper.keep(path, INF) == 5

    assert shelf.num_pinned == 5
    assert [page.kept for block in path for page in block.pages] == [True] * 5 + [False] * 3
    assert shelf.keeper.refused_pages == 3


def test_the_budget_is_for_all_holders_together_and_comes_back(shelf: Shelf) -> None:
    first, second = shelf.blocks(4), shelf.blocks(4)
    assert shelf.keeper.keep(first, INF, "one") == 4
    assert shelf.keeper.keep(second, INF, "two") == 1

    assert shelf.keeper.let_go(first) == 4

    assert shelf.keeper.keep(second, INF, "two") == 4
    assert shelf.num_pinned == 4


@pytest.mark.parametrize("until", [INF, 1e300, 101.0, 100.0])
def test_every_promise_ends(shelf: Shelf, until: float) -> None:
    path = shelf.blocks(3)
    shelf.keeper.keep(path, until)

    shelf.expire(99.0)
    assert shelf.num_pinned == 3
    shelf.expire(100.0)

    assert shelf.num_pinned == 0
    assert len(shelf.keeper) == 0


def test_a_promise_that_is_over_already_keeps_nothing(shelf: Shelf) -> None:
    shelf.clocks.advance(5.0)

    assert shelf.keeper.keep(shelf.blocks(3), 4.0) == 0

    assert shelf.num_pinned == 0


def test_the_later_of_two_promises_counts(shelf: Shelf) -> None:
    path = shelf.blocks(2)
    shelf.keeper.keep(path, 50.0)
    shelf.keeper.keep(path, 20.0)
    shelf.keeper.keep(path[:1], 80.0)

    shelf.expire(50.0)

    assert shelf.num_pinned == 1
    shelf.expire(80.0)
    assert shelf.num_pinned == 0


def test_operators_see_who_has_how_much_kept_until_when(shelf: Shelf) -> None:
    ours, theirs = shelf.blocks(2), shelf.blocks(3)
    shelf.keeper.keep(ours, 30.0, "one")
    shelf.keeper.keep(theirs, 40.0, "two")
    assert shelf.keeper.holders == [Kept("one", 2, 30.0), Kept("two", 3, 40.0)]

    shelf.keeper.keep(theirs[:1], 60.0, "one")  # the later end is one's word
    assert shelf.keeper.holders == [Kept("one", 3, 60.0), Kept("two", 2, 40.0)]

    shelf.expire(40.0)
    assert shelf.keeper.holders == [Kept("one", 1, 60.0)]
    shelf.keeper.check()


def test_keeping_the_same_again_and_again_takes_no_memory(shelf: Shelf) -> None:
    path = shelf.blocks(1)
    for step in range(5 * MAX_STALE):
        shelf.keeper.keep(path, 100.0 + step * 1e-3)
        shelf.clocks.advance(1e-3)

    assert len(shelf.keeper._queue) <= MAX_STALE + 3
    shelf.expire(100.0)
    assert shelf.num_pinned == 1
    shelf.expire(200.0)
    assert shelf.num_pinned == 0
