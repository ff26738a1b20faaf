from __future__ import annotations

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome
from kvstore.plan.settings import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, make, path, save


def test_an_outcome_that_nobody_waits_for_is_ignored() -> None:
    planner, _ = make(num_slots=8, disk_pages=8)
    planner.complete(planner.prepare_save(path(0, 2), 0, 2, 0.0).id, 0.0)
    (spill,) = planner.take_transfers()
    planner.outcome(Outcome(spill.id, (True, True), 0.001, 2), 0.0)

    for transfer_id in (spill.id, 4711):
        planner.outcome(Outcome(transfer_id, (False, False), 0.001, 0, error="again"), 1.0)

    planner.check()
    assert [tier.used_pages for tier in planner.tiers] == [2]


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
