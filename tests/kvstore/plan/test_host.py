"""Host memory: whose slots are whose, and who leaves."""

from __future__ import annotations

import pytest

from eviction.policy import Hint
from eviction.registry import make_policy
from kvstore.plan.catalog import Catalog
from kvstore.plan.host import HostMemory
from kvstore.plan.state import Block, Page, PageState
from tests.helpers.planners import make, path, save


class Host:
    """Four slots; a clock that stands at `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.catalog = Catalog(1)
        self.memory = HostMemory(4, make_policy("lru"), self.catalog, lambda: self.now)

    def put(self, seed: int, num_blocks: int, hint: Hint | None = None) -> list[Page]:
        """Pages of a new path, root first, as many as find a slot; nobody holds them."""
        request = path(seed, num_blocks)
        blocks = self.catalog.insert(request.keys)
        for block in blocks if hint is not None else ():
            block.hint = hint or block.hint
        pages = [block.pages[0] for block in blocks if not block.pages[0].state]
        pages = pages[: len(self.memory.take_for(pages, request.keys))]
        self.memory.ready(pages)
        self.memory.enter(pages, used=False)
        return pages

    def check(self) -> None:
        self.memory.check(set(self.catalog.pages()))


@pytest.fixture
def host() -> Host:
    return Host()


def test_the_tail_of_a_path_leaves_before_its_head(host: Host) -> None:
    first = host.put(0, 3)
    second = host.put(1, 2)

    assert [page.slot >= 0 for page in first] == [True, True, False]
    assert host.memory.policy.victims(4) == [*reversed(first[:2]), *reversed(second)]
    host.check()


def test_a_path_larger_than_host_memory_keeps_its_head(host: Host) -> None:
    host.put(0, 2)
    head = host.put(1, 3)  # pushes out one of the others

    tail = host.put(1, 7)

    assert [page.block.depth for page in [*head, *tail]] == [0, 1, 2, 3]
    assert [page.state for page in [*head, *tail]] == [PageState.READY] * 4
    host.check()


def test_a_pinned_page_is_no_victim_until_the_last_holder_is_gone(host: Host) -> None:
    pages = host.put(0, 2)
    host.memory.pin(pages)
    host.memory.pin(pages[:1])

    host.memory.unpin(pages, used=True)

    assert host.memory.policy.victims(4) == [pages[1]]
    assert len(host.put(1, 4)) == 3
    host.check()


def test_a_page_that_a_tier_reads_is_passed_over_and_keeps_its_place(host: Host) -> None:
    pages = host.put(0, 4)
    pages[3].spilling = 1

    host.put(1, 1)

    assert [page.state for page in pages] == [PageState.READY, PageState.READY, PageState.ABSENT, PageState.READY]
    assert host.memory.policy.victims(1) == [pages[3]]


def test_a_page_past_its_time_that_a_tier_reads_keeps_its_slot_until_that_is_over(host: Host) -> None:
    pages = host.put(0, 2, Hint(ttl_s=10.0))
    pages[0].spilling = 1
    host.now = 11.0

    host.memory.expire()

    assert [page.state for page in pages] == [PageState.EXPIRED, PageState.ABSENT]
    assert (host.memory.pool.num_free, host.memory.expired_pages) == (3, 2)
    host.check()
    pages[0].spilling = 0
    host.memory.drop_expired(pages[:1])
    assert host.memory.pool.num_free == 4


def test_a_page_of_a_forgotten_block_leaves_with_its_last_holder(host: Host) -> None:
    pages = host.put(0, 2)
    host.memory.pin(pages)
    removed: list[Block] = host.catalog.trim(pages[0].block.key, 10)
    assert len(removed) == 2

    host.memory.unpin(pages, used=False)

    assert host.memory.pool.num_free == 4
    assert len(host.memory.policy) == 0


def test_abandoned_pages_give_their_slots_back(host: Host) -> None:
    blocks = host.catalog.insert(path(0, 3).keys)
    pages = [block.pages[0] for block in blocks]
    host.memory.take_for(pages, ())
    assert host.memory.num_filling == 3

    host.memory.abandon(pages)

    assert (host.memory.num_filling, host.memory.pool.num_free) == (0, 4)
    host.check()


def test_check_sees_two_pages_in_one_slot(host: Host) -> None:
    pages = host.put(0, 2)
    pages[1].slot = pages[0].slot

    with pytest.raises(AssertionError, match="holds two pages"):
        host.check()


def test_a_smaller_host_evicts_what_nobody_holds_and_waits_for_the_rest() -> None:
    planner, _ = make(num_slots=6)
    held, loose = path(0, 3), path(1, 3)
    save(planner, held)
    save(planner, loose)
    lease = planner.prepare_load(held, 3, 0.0)

    planner.resize_host(2)
    planner.check()
    assert planner.lookup(loose, 0.0).num_blocks == 0
    assert planner.books.host.num_resident == 3
    planner.complete(lease.id, 0.0)
    planner.tick(0.0)

    assert planner.books.host.num_resident == 2
    planner.resize_host(6)
    save(planner, path(3, 4))
    assert planner.books.host.num_resident == 6
    planner.check()
