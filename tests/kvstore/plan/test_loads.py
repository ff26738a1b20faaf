"""Load leases: what they pin, what they wait for, and what their end counts."""

from __future__ import annotations

import pytest

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import LeaseState, Outcome, PlanSettings, Request
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import BLOCK, LAYOUT, land, make, path, save


def part(request: Request, num_blocks: int) -> Request:
    """The head of a prompt."""
    return Request(request.id + 1000, request.keys[:num_blocks], num_blocks * BLOCK + 1)


def test_what_is_in_host_memory_is_pinned_before_room_is_made_for_the_rest() -> None:
    planner, _ = make(num_slots=4, disk_pages=16)
    request = path(0, 4)
    save(planner, request)
    save(planner, path(1, 2))  # pushes out the tail
    planner.finished(path(1, 2), 0.0)  # so that the head is what would leave next

    lease = planner.prepare_load(request, 4, 0.0)

    assert lease.by_tier == {"host": 2, "disk": 2}
    assert not planner.books.host.policy.victims(4)
    land(planner)
    assert planner.poll(lease.id).state is LeaseState.READY
    planner.complete(lease.id, 0.0)
    planner.check()


def test_a_load_that_finds_room_for_a_part_is_cut_there_and_holds_no_more() -> None:
    planner, _ = make(num_slots=4, disk_pages=16)
    request = path(0, 4)
    save(planner, request)
    save(planner, path(1, 4))
    planner.pin(part(path(1, 4), 2), 0.0)

    lease = planner.prepare_load(request, 4, 0.0)

    assert lease.num_blocks == 2
    land(planner)
    planner.complete(lease.id, 0.0)
    planner.check()
    assert planner.num_leases == 0


def test_a_page_that_one_holder_lets_go_stays_pinned_for_the_other() -> None:
    planner, _ = make(num_slots=4)
    request = path(0, 3)
    save(planner, request)
    first, second = (planner.prepare_load(request, 3, 0.0) for _ in range(2))

    planner.complete(first.id, 0.0)

    assert len(planner.books.host.policy) == 0
    planner.release(second.id, 0.0)
    assert len(planner.books.host.policy) == 3


def test_the_end_of_a_load_counts_the_blocks_of_each_tier_if_it_was_used() -> None:
    planner, _ = make(num_slots=4, disk_pages=16)
    request = path(0, 4)
    save(planner, request)
    save(planner, path(1, 2))
    for verb in (planner.release, planner.complete):
        lease = planner.prepare_load(request, 4, 0.0)
        land(planner)
        verb(lease.id, 0.0)

    assert planner.loader.hit_blocks == {"host": 4, "disk": 0}  # the one given up had fetched them
    assert planner.loader.num_loads == 2


def test_a_page_that_could_not_be_fetched_cuts_what_is_usable() -> None:
    planner, _ = make(num_slots=4, disk_pages=16)
    request = path(0, 4)
    save(planner, request)
    save(planner, path(1, 4))
    lease = planner.prepare_load(request, 4, 0.0)

    for fetch in planner.take_transfers():
        ok = tuple(key[: len(request.keys[2])] != request.keys[2] for key in fetch.keys)
        planner.outcome(Outcome(fetch.id, ok, 0.001, 1), 0.0)

    status = planner.poll(lease.id)
    assert (status.state, status.num_blocks, status.num_tokens) == (LeaseState.READY, 2, 2 * BLOCK)
    planner.complete(lease.id, 0.0)
    assert planner.loader.hit_blocks["disk"] == 2
    planner.check()


def test_a_load_is_counted_with_the_block_that_it_ends_with() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 4)
    save(planner, request)

    planner.complete(planner.prepare_load(request, 3, 1.0).id, 2.0)

    blocks = planner.books.catalog.match(request.keys)
    assert [block.num_loads for block in blocks] == [0, 0, 1, 0]
    assert blocks[2].loaded_at == 2.0


@pytest.mark.parametrize(("verb", "num_owed"), [("release", 0), ("complete", 2)])
def test_a_tier_that_admits_on_second_use_is_owed_what_was_used(verb: str, num_owed: int) -> None:
    choosy = TierPlan("disk", 64, make_policy("lru"), is_indexed=True, is_shared=False, admit="second_use")
    planner = Planner(LAYOUT, PlanSettings(4, load_or_recompute=False), make_policy("lru"), [choosy])
    request = path(0, 2)
    save(planner, request)
    assert planner.take_transfers() == []

    lease = planner.prepare_load(request, 2, 0.0)
    getattr(planner, verb)(lease.id, 0.0)

    assert sum(len(spill.keys) for spill in planner.take_transfers()) == num_owed


def test_the_time_that_loading_saved_is_that_of_computing() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 3)
    save(planner, request)
    planner.observe_prefill(100 * BLOCK, 200.0)  # a block in two seconds

    planner.complete(planner.prepare_load(request, 3, 0.0).id, 0.0)

    assert planner.loader.seconds_saved == pytest.approx(6.0)


def test_a_load_that_was_given_up_saved_no_time() -> None:
    planner, _ = make(num_slots=8)
    request = path(0, 3)
    save(planner, request)
    planner.observe_prefill(100 * BLOCK, 200.0)

    planner.release(planner.prepare_load(request, 3, 0.0).id, 0.0)

    assert planner.loader.seconds_saved == 0.0
