"""Tiers that are attached and detached while requests run."""

from eviction.registry import make_policy
from kvstore.page import PageMeta, page_key
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Transfer
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, make, path, save


def disk(capacity_pages: int = 8) -> TierPlan:
    return TierPlan("disk", capacity_pages, make_policy("lru"), is_indexed=True, is_shared=False)


def test_a_detached_tier_is_a_miss_and_gets_nothing_more() -> None:
    planner, _ = make(num_slots=2, disk_pages=8)
    first = path(0, 2)
    save(planner, first)
    save(planner, path(1, 2))
    assert planner.lookup(first, 0.0).num_blocks == 2

    planner.detach_tier("disk")
    planner.check()

    assert planner.lookup(first, 0.0).num_blocks == 0
    assert planner.explain(first).left == (1000.0, "disk", "detached")
    save(planner, path(2, 2))
    assert planner.take_transfers() == []
    planner.set_tier_up("disk", True, 0.0)
    assert not planner.books.tiers[0].is_up


def test_a_spill_that_lands_after_its_tier_was_detached_counts_for_nothing() -> None:
    planner, _ = make(num_slots=4, disk_pages=8)
    request = path(0, 2)
    lease = planner.prepare_save(request, 0, 2, 0.0)
    planner.complete(lease.id, 0.0)
    (spill,) = planner.take_transfers()

    planner.detach_tier("disk")
    planner.check()
    planner.outcome(Outcome(spill.id, (True, True), 0.001, 1), 0.0)

    planner.check()
    assert planner.books.tiers[0].used_pages == 0


def test_a_tier_that_is_back_knows_what_it_holds_and_is_written_to_again() -> None:
    planner, _ = make(num_slots=4, disk_pages=8)
    planner.detach_tier("disk")
    old = path(7, 2)

    planner.attach_tier(disk(16))
    metas = [PageMeta(4096, b"", 0), PageMeta(4096, old.keys[0], 1)]
    planner.restore("disk", [(page_key(key), meta) for key, meta in zip(old.keys, metas, strict=True)])
    save(planner, path(0, 2))
    planner.check()

    assert planner.lookup(old, 0.0).by_tier == {"disk": 2}
    assert planner.books.tiers[0].used_pages == 4


def test_a_tier_that_was_never_there_can_be_attached() -> None:
    planner = Planner(LAYOUT, PlanSettings(2, load_or_recompute=False), make_policy("lru"))
    save(planner, path(0, 2))

    planner.attach_tier(disk())
    save(planner, path(1, 2))
    save(planner, path(2, 2))

    assert planner.lookup(path(1, 2), 0.0).by_tier == {"disk": 2}
    lease = planner.prepare_load(path(1, 2), 2, 0.0)
    fetches: list[Transfer] = [t for t in planner.take_transfers() if t.op is Op.FETCH]
    assert sum(len(t.keys) for t in fetches) == 2
    for transfer in fetches:
        planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001, 1), 0.0)
    planner.complete(lease.id, 0.0)
    land(planner)
    assert planner.loader.hit_blocks["disk"] == 2
