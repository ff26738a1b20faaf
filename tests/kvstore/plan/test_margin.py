"""Exclusive tiers: pages go down when they leave host memory, and leave the tier when they are used above it."""

from __future__ import annotations

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings, Request
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, path, publish, save


def make(num_slots: int = 16, disk_pages: int = 64) -> Planner:
    disk = TierPlan("disk", disk_pages, make_policy("lru"), is_indexed=True, is_shared=False, exclusive=True)
    return Planner(LAYOUT, PlanSettings(num_slots, load_or_recompute=False), make_policy("lru"), [disk])


def found(planner: Planner, request: Request) -> dict[str, int]:
    return planner.lookup(request, 0.0).by_tier


def load(planner: Planner, request: Request) -> None:
    lease = planner.prepare_load(request, len(request.keys), 0.0)
    land(planner)
    planner.complete(lease.id, 0.0)
    land(planner)


def flush(planner: Planner) -> None:
    flushing = planner.flushing()
    while not flushing.is_over(1000.0):
        land(planner)


def on_disk(planner: Planner) -> int:
    return planner.books.tiers[0].used_pages


def test_nothing_is_written_while_host_memory_has_room() -> None:
    planner = make()

    publish(planner, path(0, 8))

    assert planner.take_transfers() == []


def test_pages_that_will_leave_next_are_written_ahead_and_found_when_they_have_left() -> None:
    planner = make()

    for seed in range(12):
        save(planner, path(seed, 2))

    assert planner.books.tiers[0].debts.num_lost == 0
    assert found(planner, path(0, 2)) == {"disk": 2}
    assert found(planner, path(11, 2)) == {"host": 2}
    assert on_disk(planner) <= 24 - 16 + 2 + 2, "more than the margin is in both"


def test_what_is_back_in_host_memory_is_the_first_to_leave_the_disk_and_is_written_again_in_time() -> None:
    planner = make(16, 12)
    for seed in range(13):
        save(planner, path(seed, 2))
    load(planner, path(0, 2))
    planner.finished(path(0, 2), 1000.0)
    land(planner)
    (disk,) = planner.books.tiers
    assert disk.plan.policy is not None
    assert [page.block.key for page in disk.plan.policy.victims(2)] == path(0, 2).keys[::-1]

    for seed in range(13, 22):
        save(planner, path(seed, 2))

    assert found(planner, path(0, 2)) == {"disk": 2}


def test_what_a_promise_keeps_in_host_memory_is_not_the_first_to_leave_the_disk() -> None:
    planner = make()
    save(planner, path(0, 1))
    save(planner, path(1, 1))
    flush(planner)
    planner.pin(path(0, 1), 0.0)

    for seed in (1, 0):
        planner.finished(path(seed, 1), 1000.0)

    (disk,) = planner.books.tiers
    assert disk.plan.policy is not None
    assert [page.block.key for page in disk.plan.policy.victims(2)] == [path(1, 1).keys[0], path(0, 1).keys[0]]


def test_what_leaves_host_memory_is_no_longer_the_first_to_leave_the_disk() -> None:
    planner = make(4)
    for seed in range(2):
        save(planner, path(seed, 2))
    flush(planner)
    for seed in range(2):
        planner.finished(path(seed, 2), 1000.0)
    (disk,) = planner.books.tiers
    assert disk.plan.policy is not None

    save(planner, path(2, 2))

    assert found(planner, path(0, 2)) == {"disk": 2}
    first = disk.plan.policy.victims(1)
    assert first[0].block.key in path(1, 2).keys


def test_a_flush_writes_everything_that_only_host_memory_has() -> None:
    planner = make()
    told = planner.told()
    publish(planner, path(0, 8))

    flushing = planner.flushing()
    assert not flushing.is_over(0.0)
    land(planner)

    assert flushing.is_over(0.0)
    assert planner.flush_result(told)
    assert on_disk(planner) == 8


def test_what_leaves_in_one_go_beyond_the_margin_is_lost_and_counted() -> None:
    planner = make()
    save(planner, path(0, 12))

    publish(planner, path(1, 14))
    land(planner)

    assert planner.books.tiers[0].debts.num_lost > 0
    planner.check()


def test_a_flush_keeps_what_host_memory_has_though_the_disk_is_full() -> None:
    planner = make(8, 12)
    for seed in range(12):
        save(planner, path(seed, 2))
    for seed in range(8, 12):
        planner.finished(path(seed, 2), 1000.0)
    told = planner.told()

    flush(planner)

    assert planner.flush_result(told)
    (disk,) = planner.books.tiers
    assert all(disk.has(page) for page in planner.books.catalog.pages() if page.slot >= 0)
