"""The planner as a whole: one state machine, and the ways that a verb takes through it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eviction.registry import make_policy
from kvstore.clock import Clock
from kvstore.plan.in_steps import MAX_REASONS
from kvstore.plan.planner import Planner
from kvstore.plan.records import LeaseState, Op, Outcome, PlanSettings
from kvstore.plan.tier_plan import TierPlan
from tests.bench import bench_hops
from tests.helpers.planners import LAYOUT, land, make, path, publish, save


def test_an_outcome_that_nobody_waits_for_is_ignored() -> None:
    planner, _ = make(num_slots=8, disk_pages=8)
    planner.complete(planner.prepare_save(path(0, 2), 0, 2, 0.0).id, 0.0)
    (spill,) = planner.take_transfers()
    planner.outcome(Outcome(spill.id, (True, True), 0.001, 2), 0.0)

    for transfer_id in (spill.id, 4711):
        planner.outcome(Outcome(transfer_id, (False, False), 0.001, 0, error="again"), 1.0)

    planner.check()
    assert [tier.used_pages for tier in planner.books.tiers] == [2]


def test_what_was_fetched_from_one_tier_is_owed_to_the_others() -> None:
    tiers = [TierPlan(name, 8, make_policy("lru"), is_indexed=True, is_shared=False) for name in ("disk", "other")]
    planner = Planner(LAYOUT, PlanSettings(2, load_or_recompute=False), make_policy("lru"), tiers)
    request = path(0, 2)
    planner.set_tier_up("other", False, 0.0)
    save(planner, request)
    save(planner, path(1, 2))  # the first pages leave host memory
    planner.set_tier_up("other", True, 0.0)
    land(planner)
    assert planner.lookup(request, 0.0).by_tier == {"disk": 2}

    lease = planner.prepare_load(request, 2, 0.0)
    fetches = planner.take_transfers()
    for fetch in fetches:
        planner.outcome(Outcome(fetch.id, (True,) * len(fetch.keys), 0.001, 1), 0.0)
    planner.complete(lease.id, 0.0)

    assert {fetch.tier for fetch in fetches} == {"disk"}
    assert {(spill.op, spill.tier) for spill in planner.take_transfers()} == {(Op.SPILL, "other")}


def test_reasons_are_counted_as_long_as_there_are_few() -> None:
    planner, _ = make(num_slots=8)
    for number in range(MAX_REASONS + 5):
        planner.finished(path(0, 1), 0.0, finish_reason="stop")
        planner.finished(path(0, 1), 0.0, finish_reason=f"reason {number}")

    reasons = planner.in_steps.finish_reasons
    assert reasons["stop"] == MAX_REASONS + 5
    assert reasons["other"] == 6
    assert len(reasons) == MAX_REASONS + 1


def test_a_page_goes_from_absent_to_filling_to_ready_and_back() -> None:
    planner, _ = make(num_slots=4)
    request, host = path(0, 4), planner.books.host

    lease = planner.prepare_save(request, 0, 4, 0.0)
    assert (host.num_filling, host.num_resident) == (4, 0)
    assert planner.lookup(request, 0.0).num_blocks == 0
    planner.complete(lease.id, 0.0)
    assert (host.num_filling, host.num_resident) == (0, 4)
    assert planner.lookup(request, 0.0).num_blocks == 4
    planner.forget(request, 0, 0.0)

    assert (host.num_filling, host.num_resident, host.pool.num_free) == (0, 0, 4)


def test_a_transfer_leaves_the_planner_once() -> None:
    planner, _ = make(num_slots=4, disk_pages=8)
    publish(planner, path(0, 2))

    (spill,) = planner.take_transfers()

    assert planner.take_transfers() == []
    planner.outcome(Outcome(spill.id, (True, True), 0.001, 1), 0.0)
    assert planner.take_transfers() == []
    assert len(planner.books.transfers) == 0


def test_a_lease_that_ended_or_never_was_has_no_usable_block() -> None:
    planner, _ = make(num_slots=4)
    save(planner, path(0, 2))
    lease = planner.prepare_load(path(0, 2), 2, 0.0)
    assert planner.poll(lease.id).num_blocks == 2
    planner.complete(lease.id, 0.0)

    for lease_id in (lease.id, 4711):
        status = planner.poll(lease_id)
        assert (status.state, status.num_blocks) == (LeaseState.CLOSED, 0)


def test_leases_of_a_dead_owner_end_and_those_of_others_do_not() -> None:
    planner, _ = make(num_slots=8)
    save(planner, path(0, 2))
    planner.prepare_load(path(0, 2), 2, 0.0, owner="dead")
    planner.prepare_save(path(1, 2), 0, 2, 0.0, owner="dead")
    alive = planner.prepare_load(path(0, 2), 2, 0.0, owner="alive")

    assert planner.release_owner("dead", 0.0) == 2

    assert planner.num_leases == 1
    assert planner.poll(alive.id).num_blocks == 2
    planner.check()


def _no_clock() -> float:
    raise AssertionError("the clock was asked")


def test_a_lookup_of_what_is_in_host_memory_asks_no_clock_where_nothing_has_a_deadline() -> None:
    asks_nothing = Clock(wall=_no_clock, steady=_no_clock, boot=_no_clock)
    planner, _ = make(num_slots=8, disk_pages=8)
    request = path(0, 3)
    save(planner, request)
    planner.books.host._boot = _no_clock
    planner.books.tiers[0].wall = asks_nothing.wall

    assert planner.lookup(request, 0.0).num_blocks == 3


def test_a_lookup_of_what_is_in_host_memory_sends_no_question_to_a_shared_tier() -> None:
    redis = TierPlan("redis", None, None, is_indexed=False, is_shared=True)
    planner = Planner(LAYOUT, PlanSettings(4, load_or_recompute=False), make_policy("lru"), [redis])
    save(planner, path(0, 3))

    match = planner.lookup(path(0, 3), 0.0)

    assert (match.num_blocks, match.pending) == (3, False)
    assert planner.take_transfers() == []
    assert planner.lookup(replace(path(0, 4), id=99), 0.0).pending  # it is asked about what is missing
    assert [transfer.op for transfer in planner.take_transfers()] == [Op.PROBE]


def test_a_lookup_that_is_a_plain_hit_in_host_memory_goes_through_ten_files(tmp_path: Path) -> None:
    files = {verb: files for verb, _, files, _ in bench_hops.run(tmp_path)}

    found = files["lookup, a hit in host memory"]

    assert len(found) <= 10, found
