"""Save leases, and what their end means to the order in which pages leave."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eviction.lru import Lru
from eviction.ttl import Ttl
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings, Request
from kvstore.plan.state import Page
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, make, path, save


def leaving(planner: Planner, *requests: Request) -> list[str]:
    """Who owns the pages that leave next, the first to leave first."""
    owners = {key: chr(ord("a") + index) for index, request in enumerate(requests) for key in request.keys}
    return [owners[page.block.key] for page in planner.books.host.policy.victims(8)]


def test_the_pages_of_a_request_that_ended_while_it_was_saved_are_the_most_recent_when_they_are_published() -> None:
    planner, _ = make(num_slots=8)
    first, second = path(0, 3), path(1, 2)
    save(planner, second)
    lease = planner.prepare_save(first, 0, 3, 1.0)

    planner.finished(first, 2.0)
    planner.finished(second, 3.0)
    planner.complete(lease.id, 4.0)

    assert leaving(planner, first, second) == ["b", "b", "a", "a", "a"]
    planner.check()


def test_a_path_that_was_saved_in_parts_after_its_request_ended_leaves_tail_first() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 4)
    leases = [planner.prepare_save(request, first, 2, 0.0) for first in (0, 2)]
    planner.finished(request, 1.0)

    for lease in leases:
        planner.complete(lease.id, 2.0)

    assert [page.block.key for page in planner.books.host.policy.victims(4)] == request.keys[::-1]
    planner.check()


def test_pages_that_find_no_slot_are_skipped_and_counted() -> None:
    planner, _ = make(num_slots=4)
    held = planner.prepare_save(path(0, 3), 0, 3, 0.0)

    lease = planner.prepare_save(path(1, 4), 0, 4, 0.0)

    assert [page.block for page in lease.pages] == [0]
    assert lease.skipped == planner.saver.counters["skipped_saves"] == 3
    planner.release(held.id, 0.0)
    planner.release(lease.id, 0.0)
    planner.check()
    assert planner.books.host.pool.num_free == 4


def test_a_block_that_another_lease_fills_is_not_given_out_again() -> None:
    planner, _ = make(num_slots=8)
    first = planner.prepare_save(path(0, 3), 0, 3, 0.0)

    second = planner.prepare_save(path(0, 3), 0, 3, 0.0)

    assert (len(first.pages), len(second.pages), second.skipped) == (3, 0, 0)
    assert planner.saver.counters["dedup_saves"] == 3


def test_only_what_was_filled_is_published() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 4)
    lease = planner.prepare_save(request, 0, 4, 0.0)

    planner.complete(lease.id, 0.0, [True, True, False, True])

    assert planner.lookup(request, 0.0).num_blocks == 2
    assert planner.saver.counters["aborted_saves"] == 1
    planner.check()


def test_a_list_of_another_length_ends_nothing() -> None:
    planner, _ = make(num_slots=8)
    lease = planner.prepare_save(path(0, 3), 0, 3, 0.0)

    with pytest.raises(ValueError, match="filled has 2 entries, the lease has 3 pages"):
        planner.complete(lease.id, 0.0, [True, True])

    planner.complete(lease.id, 0.0)
    assert planner.lookup(path(0, 3), 0.0).num_blocks == 3


def test_a_save_that_was_released_leaves_no_block_behind() -> None:
    planner, _ = make(num_slots=8)
    lease = planner.prepare_save(path(0, 3), 0, 3, 0.0)

    planner.release(lease.id, 0.0)
    planner.complete(lease.id, 0.0)  # comes too late

    assert len(planner.books.catalog.tree) == 0
    assert planner.books.host.pool.num_free == 8


def test_blocks_that_were_forgotten_while_they_were_filled_are_not_published() -> None:
    planner, _ = make(num_slots=8, disk_pages=8)
    request = path(0, 4)
    lease = planner.prepare_save(request, 0, 4, 0.0)
    planner.forget(request, 2, 0.0)

    planner.complete(lease.id, 0.0)

    assert planner.lookup(request, 0.0).num_blocks == 2
    assert planner.saver.counters["saved_pages"] == 2
    assert [len(spill.keys) for spill in planner.take_transfers()] == [2]
    assert planner.books.host.pool.num_free == 6
    planner.check()


class Miser(Lru[Page]):
    """It finds one page of each request worth what it would push out."""

    def worth(self, keys: Sequence[Page], now: float) -> list[float]:
        return [1.0] * len(keys)

    def num_worthy(
        self, request_id: int, keys: Sequence[Page], victims: Sequence[Page], now: float, priority: int = 0
    ) -> int:
        return min(len(keys), 1)


@pytest.mark.parametrize("has_disk", [False, True])
def test_what_is_worth_less_than_what_it_would_push_out_is_not_saved_where_no_tier_below_wants_it(
    has_disk: bool,
) -> None:
    disk = TierPlan("disk", 64, Ttl(Lru()), is_indexed=True, is_shared=False)
    settings = PlanSettings(8, load_or_recompute=False)
    planner = Planner(LAYOUT, settings, Ttl(Miser()), [disk] if has_disk else [])
    first, second = path(0, 6), path(1, 6)
    save(planner, first)

    lease = planner.prepare_save(second, 0, 6, 1.0)

    num_saved = 6 if has_disk else 3  # two free slots and the one
    assert list(lease.pages.blocks) == list(range(num_saved))
    assert lease.skipped == planner.saver.counters["skipped_saves"] == 6 - num_saved
    planner.release(lease.id, 1.0)
    planner.check()
