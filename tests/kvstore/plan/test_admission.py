"""Admission by forecast, and the write budget of a tier."""

from __future__ import annotations

from collections.abc import Sequence

from eviction.lru import Lru
from eviction.registry import make_policy
from eviction.ttl import Ttl
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, PlanSettings
from kvstore.plan.state import Page
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.write_budget import WriteBudget
from tests.helpers.planners import LAYOUT, land, path, publish, save

DAY = 86_400.0


class ByDepth(Lru[Page]):
    """A policy by whose forecast a page is worth more the nearer it is to the root."""

    def worth(self, keys: Sequence[Page], now: float) -> list[float]:
        return [-float(page.block.depth) for page in keys]


def make(disk_pages: int, *, max_writes_per_day: int = 0) -> Planner:
    disk = TierPlan(
        "disk",
        disk_pages,
        Ttl(ByDepth()),
        is_indexed=True,
        is_shared=False,
        admit="predicted",
        max_writes_per_day=max_writes_per_day,
    )
    return Planner(LAYOUT, PlanSettings(64, load_or_recompute=False, batch_pages=2), make_policy("lru"), [disk])


def test_a_page_is_written_where_there_is_room_whatever_it_is_worth() -> None:
    planner = make(8)

    save(planner, path(0, 8))

    assert planner.books.tiers[0].used_pages == 8


def test_a_page_that_is_worth_no_more_than_what_would_leave_for_it_is_not_written() -> None:
    planner = make(2)
    save(planner, path(0, 2))

    save(planner, path(1, 6))

    (disk,) = planner.books.tiers
    depths = sorted(page.block.depth for page in planner.books.catalog.pages() if disk.has(page))
    assert depths == [0, 0] or depths == [0, 1]
    assert disk.counters.refused_pages >= 4
    assert len(disk.debts) == disk.debts.num_lost == 0


def test_a_flush_is_right_though_pages_were_not_admitted() -> None:
    planner = make(2)
    told = planner.told()
    save(planner, path(0, 6))

    flushing = planner.flushing()

    assert flushing.is_over(0.0)
    assert planner.flush_result(told)


def test_no_more_is_written_in_a_day_than_the_budget_and_an_hours_share() -> None:
    budget = WriteBudget(24_000)
    written = 0

    for second in range(0, int(DAY), 10):
        budget.fill(float(second))
        if not budget.is_spent:
            budget.spend(500)
            written += 500

    assert 24_000 <= written <= 24_000 + 1_000 + 500
    assert budget.num_spent > 0


def test_a_clock_that_stands_or_goes_back_earns_nothing() -> None:
    budget = WriteBudget(24_000)
    budget.fill(100.0)
    assert not budget.is_spent
    budget.spend(1_000)

    budget.fill(100.0)
    assert budget.is_spent
    budget.fill(50.0)
    assert budget.is_spent
    budget.fill(60.0)
    assert not budget.is_spent


def test_what_the_budget_keeps_back_waits_and_is_written_when_it_allows() -> None:
    planner = make(64, max_writes_per_day=24 * 4096 * 4)  # four pages at once
    told = planner.told()
    publish(planner, path(0, 8))
    land(planner)
    (disk,) = planner.books.tiers
    assert (disk.used_pages, len(disk.debts)) == (4, 4)

    assert planner.flushing().is_over(0.0), "a flush waits for nothing that cannot be done now"
    assert planner.flush_result(told).missing == {"disk": {"budget": 4}}

    planner.tick(3600.0)
    land(planner)
    assert (disk.used_pages, len(disk.debts)) == (8, 0)
    assert planner.flush_result(told)


def test_deletes_are_done_though_the_budget_is_spent() -> None:
    planner = make(64, max_writes_per_day=24 * 4096 * 2)
    save(planner, path(0, 4))

    planner.forget(path(0, 4), 0, 0.0)

    assert any(transfer.op is Op.DELETE for transfer in planner.take_transfers())
