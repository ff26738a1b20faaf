"""A flush is true if everything that was saved is on every tier that should have it; else it says what is missing."""

from __future__ import annotations

import pytest

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import FlushResult, Op, Outcome, PlanSettings, Transfer
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, make, path, publish, save


def answer(planner: Planner, transfer: Transfer, *, ok: bool = True) -> None:
    error = None if ok else "refused"
    planner.outcome(Outcome(transfer.id, (ok,) * len(transfer.keys), 0.001, 1, error), 0.0)
    planner.check()


def test_all_is_well_when_all_that_was_saved_is_written() -> None:
    planner, _ = make(disk_pages=8)
    told = planner.told()
    publish(planner, path(0, 2))

    assert planner.flush_result(told).missing == {"disk": {"waiting": 2}}
    land(planner)

    result = planner.flush_result(told)
    assert result
    assert result == FlushResult(True, {"disk": 2}, {}, {})


def test_a_page_evicted_before_it_was_written_is_lost_and_told_once_to_each_caller() -> None:
    planner, _ = make(num_slots=4, disk_pages=64)
    ours, theirs = planner.told(), planner.told()
    planner.set_tier_up("disk", False, 0.0)
    publish(planner, path(0, 4))
    publish(planner, path(1, 4))

    assert planner.flush_result(ours).missing == {"disk": {"out": 4, "lost": 4}}
    planner.set_tier_up("disk", True, 0.0)
    land(planner)

    assert planner.flush_result(ours)
    assert planner.flush_result(theirs).missing == {"disk": {"lost": 4}}
    assert planner.flush_result(theirs)
    assert planner.flush_result(planner.told())  # who begins now has lost nothing


def test_pages_that_a_tier_refused_stay_missing_until_they_are_there() -> None:
    planner, _ = make(disk_pages=8)
    told = planner.told()
    publish(planner, path(0, 2))
    answer(planner, planner.take_transfers()[0], ok=False)

    assert planner.flush_result(told).missing == {"disk": {"refused": 2}}
    assert planner.flush_result(told).missing == {"disk": {"refused": 2}}

    flushing = planner.flushing()
    assert not flushing.is_over(0.0)  # it has them tried again
    (spill,) = planner.take_transfers()
    answer(planner, spill)
    assert flushing.is_over(0.0)
    assert planner.flush_result(told)


def test_a_flush_tries_once_more_and_then_says_what_is_missing() -> None:
    planner, _ = make(disk_pages=8)
    publish(planner, path(0, 2))
    flushing = planner.flushing()
    for _ in range(2):
        assert not flushing.is_over(0.0)
        answer(planner, planner.take_transfers()[0], ok=False)

    assert flushing.is_over(0.0)
    assert planner.take_transfers() == []


def test_what_was_refused_is_written_when_the_tier_is_back() -> None:
    planner, _ = make(disk_pages=8)
    told = planner.told()
    publish(planner, path(0, 2))
    answer(planner, planner.take_transfers()[0], ok=False)
    planner.set_tier_up("disk", False, 0.0)
    assert planner.flushing().is_over(0.0)  # nothing can be done now
    assert planner.flush_result(told).missing == {"disk": {"out": 2}}

    planner.set_tier_up("disk", True, 0.0)
    land(planner)

    assert planner.flush_result(told)


def test_a_page_that_was_refused_and_then_evicted_is_lost() -> None:
    planner, _ = make(num_slots=4, disk_pages=64)
    told = planner.told()
    publish(planner, path(0, 4))
    for transfer in planner.take_transfers():
        answer(planner, transfer, ok=False)
    save(planner, path(1, 4))

    assert planner.flush_result(told).missing == {"disk": {"lost": 4}}


def test_a_page_that_was_forgotten_is_not_missed() -> None:
    planner, _ = make(disk_pages=8)
    told = planner.told()
    planner.set_tier_up("disk", False, 0.0)
    publish(planner, path(0, 4))
    planner.forget(path(0, 4), 0, 0.0)
    planner.set_tier_up("disk", True, 0.0)
    land(planner)

    assert planner.flush_result(told)


def test_a_tier_that_admits_on_second_use_misses_nothing_it_was_not_owed() -> None:
    disk = TierPlan("disk", 64, make_policy("lru"), is_indexed=True, is_shared=False, admit="second_use")
    planner = Planner(LAYOUT, PlanSettings(4, load_or_recompute=False), make_policy("lru"), [disk])
    told = planner.told()
    save(planner, path(0, 4))
    save(planner, path(1, 4))

    assert planner.flush_result(told)


def test_a_page_on_its_way_from_one_tier_to_another_is_not_lost_if_it_does_not_arrive() -> None:
    tiers = [
        TierPlan("disk", 64, make_policy("lru"), is_indexed=True, is_shared=False),
        TierPlan("redis", None, None, is_indexed=False, is_shared=True),
    ]
    planner = Planner(LAYOUT, PlanSettings(4, load_or_recompute=False), make_policy("lru"), tiers)
    told = planner.told()
    planner.lookup(path(0, 4), 0.0)
    (probe,) = planner.take_transfers()
    planner.outcome(Outcome(probe.id, (True,) * 4, 0.001), 0.0)
    planner.set_tier_up("disk", False, 0.0)
    request = path(0, 4)
    lease = planner.prepare_load(request, planner.lookup(request, 0.0).num_blocks, 0.0)
    planner.complete(lease.id, 0.0)
    land(planner)
    planner.set_tier_up("disk", True, 0.0)
    planner.complete(planner.prepare_save(path(1, 4), 0, 4, 0.0).id, 0.0)
    land(planner)

    assert planner.flush_result(told)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (FlushResult(True, {"disk": 3}), "all is there"),
        (
            FlushResult(False, {}, {"redis": {"out": 3, "lost": 1}}, {"disk": {"waiting": 2}}),
            "redis: 3 pages out, redis: 1 pages lost, disk: 2 deletes waiting",
        ),
        (FlushResult(False, error="the daemon does not answer"), "the daemon does not answer"),
    ],
)
def test_a_result_reads_as_a_line_of_a_log(result: FlushResult, words: str) -> None:
    assert str(result) == words


def test_writes_under_way_are_waited_for() -> None:
    planner, _ = make(disk_pages=8)
    publish(planner, path(0, 2))
    flushing = planner.flushing()

    assert not flushing.is_over(0.0)
    assert [t.op for t in planner.take_transfers()] == [Op.SPILL]
