"""A lower tier as the planner sees it: what it holds, what it is owed, who leaves it."""

from __future__ import annotations

from collections.abc import Sequence

from eviction.registry import make_policy
from kvstore.direction import Direction
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Transfer
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, make, path, publish, save


def over(num_slots: int = 16, **plan: int) -> Planner:
    """A planner with a disk tier."""
    fields = {"capacity_pages": 64, "window_pages": 64} | plan
    tier = TierPlan("disk", policy=make_policy("lru"), is_indexed=True, is_shared=False, **fields)
    return Planner(LAYOUT, PlanSettings(num_slots, load_or_recompute=False, batch_pages=2), make_policy("lru"), [tier])


def answer(planner: Planner, transfers: Sequence[Transfer], *, ok: bool = True) -> None:
    for transfer in transfers:
        planner.outcome(Outcome(transfer.id, (ok,) * len(transfer.keys), 0.001, 1), 0.0)


def test_pages_are_written_behind_as_many_at_a_time_as_the_window_takes() -> None:
    planner = over(window_pages=4)
    publish(planner, path(0, 7))

    first = planner.take_transfers()
    assert [len(spill.keys) for spill in first] == [2, 2]
    assert planner.books.tiers[0].in_flight == 4
    answer(planner, first[:1])

    assert [len(spill.keys) for spill in planner.take_transfers()] == [2]
    planner.check()


def test_a_page_that_is_merely_owed_may_leave_and_is_lost_to_the_tier() -> None:
    planner = over(num_slots=4, window_pages=2)
    publish(planner, path(0, 4))  # two are on their way, two are owed

    publish(planner, path(1, 2))

    assert planner.lookup(path(0, 4), 0.0).num_blocks == 2
    planner.told()  # looks for what is lost
    assert planner.books.tiers[0].debts.num_lost == 2
    planner.check()


def test_a_page_on_its_way_to_the_tier_keeps_its_slot_until_it_is_there() -> None:
    planner = over(num_slots=2)
    publish(planner, path(0, 2))
    spills = planner.take_transfers()

    assert planner.prepare_save(path(1, 2), 0, 2, 0.0).skipped == 2
    answer(planner, spills)

    assert planner.prepare_save(path(2, 2), 0, 2, 0.0).skipped == 0
    assert planner.lookup(path(0, 2), 0.0).by_tier == {"disk": 2}


def test_a_tier_that_takes_no_writes_keeps_its_queue_and_is_paid_later() -> None:
    planner = over()
    planner.set_tier_up("disk", False, 0.0, [Direction.WRITE])
    publish(planner, path(0, 3))
    assert planner.take_transfers() == []
    assert planner.books.tiers[0].is_up  # reads go on

    planner.set_tier_up("disk", True, 0.0, [Direction.WRITE])

    assert sum(len(spill.keys) for spill in planner.take_transfers()) == 3


def test_a_full_tier_gives_up_the_tail_of_the_oldest_path_with_the_write_that_needs_its_place() -> None:
    planner = over(capacity_pages=4)
    old, new = path(0, 4), path(1, 2)
    save(planner, old)
    planner.finished(old, 0.0)  # batches enter one after the other; this puts the path in order
    land(planner)

    publish(planner, new)
    (spill,) = planner.take_transfers()

    assert {key[:32] for key in spill.evict} == set(old.keys[2:])
    answer(planner, [spill])
    assert planner.books.tiers[0].used_pages == 4
    assert planner.books.tiers[0].counters.evicted_pages == 2
    planner.check()


def test_a_copy_that_a_fetch_reads_does_not_leave_its_tier() -> None:
    planner = over(num_slots=2, capacity_pages=2)
    request = path(0, 2)
    save(planner, request)
    planner.books.host.drop([page for page in planner.books.catalog.pages() if page.slot >= 0])
    lease = planner.prepare_load(request, 2, 0.0)
    assert planner.books.tiers[0].plan.policy is not None

    assert len(planner.books.tiers[0].plan.policy) == 0
    land(planner)

    assert len(planner.books.tiers[0].plan.policy) == 2
    planner.complete(lease.id, 0.0)
    planner.check()


def test_a_page_that_is_forgotten_while_it_is_written_is_deleted_when_it_is_there() -> None:
    planner = over()
    request = path(0, 2)
    publish(planner, request)
    (spill,) = planner.take_transfers()

    planner.forget(request, 0, 0.0)
    assert planner.take_transfers() == []  # not while it is being written
    answer(planner, [spill])

    (delete,) = planner.take_transfers()
    assert delete.op is Op.DELETE
    assert set(delete.keys) == set(spill.keys)
    assert planner.books.host.pool.num_free == 16


def test_a_write_that_failed_is_not_counted_as_held() -> None:
    planner = over()
    publish(planner, path(0, 2))
    answer(planner, planner.take_transfers(), ok=False)

    tier = planner.books.tiers[0]

    assert (tier.used_pages, tier.in_flight, tier.counters.failed_pages) == (0, 0, 2)
    planner.check()


def test_a_page_that_the_medium_no_longer_has_is_owed_again_when_it_is_used() -> None:
    planner, _ = make(num_slots=8, disk_pages=8)
    request = path(0, 2)
    save(planner, request)
    planner.finished(request, 0.0)
    answer(planner, [touch for touch in planner.take_transfers() if touch.op is Op.TOUCH], ok=False)

    assert sum(len(spill.keys) for spill in planner.take_transfers() if spill.op is Op.SPILL) == 2
    planner.check()
