"""Fetches: shared by those who wait for one page, tried elsewhere when they fail, bounded when nobody waits."""

from __future__ import annotations

import pytest

from eviction.registry import make_policy
from kvstore.plan.planner import Planner
from kvstore.plan.records import LeaseState, Op, Outcome, PlanSettings, Priority, Request, Transfer
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.planners import LAYOUT, land, make, path, save


class Below:
    """A prompt of four blocks on one disk, or two, and a host of eight slots that has none of it."""

    def __init__(self, *tiers: str, max_prefetch_slots: int = 64) -> None:
        plans = [
            TierPlan(name, 64, make_policy("lru"), is_indexed=True, is_shared=False) for name in tiers or ("disk",)
        ]
        settings = PlanSettings(
            8, load_or_recompute=False, batch_pages=2, max_prefetch_slots=max_prefetch_slots, load_deadline_s=2.0
        )
        self.planner = Planner(LAYOUT, settings, make_policy("lru"), plans)
        self.request = path(0, 4)
        save(self.planner, self.request)
        self.planner.books.host.drop(list(self.planner.books.catalog.pages()))

    def again(self) -> Request:
        """Another request for the same prompt."""
        return Request(99, self.request.keys, self.request.num_tokens)

    def fetches(self) -> list[Transfer]:
        return [transfer for transfer in self.planner.take_transfers() if transfer.op is Op.FETCH]

    def answer(self, transfer: Transfer, *, ok: bool, now: float = 0.0) -> None:
        self.planner.outcome(Outcome(transfer.id, (ok,) * len(transfer.keys), 0.001, 1), now)


def test_loads_of_one_page_share_one_fetch() -> None:
    below = Below()
    planner = below.planner
    first = planner.prepare_load(below.request, 4, 0.0)
    fetches = below.fetches()

    second = planner.prepare_load(below.again(), 4, 0.0)

    assert below.fetches() == []
    assert planner.fetches.counters["shared_fetches"] == 4
    for fetch in fetches:
        below.answer(fetch, ok=True)
    assert [planner.poll(lease.id).state for lease in (first, second)] == [LeaseState.READY] * 2
    planner.check()


def test_a_page_that_one_tier_does_not_give_is_fetched_from_another_that_has_it() -> None:
    below = Below("disk", "other")
    lease = below.planner.prepare_load(below.request, 4, 0.0)
    fetches = below.fetches()

    below.answer(fetches[0], ok=False)

    (retry,) = below.fetches()
    assert (retry.tier != fetches[0].tier, retry.keys) == (True, fetches[0].keys)
    assert below.planner.fetches.failures[fetches[0].tier] == 2
    for fetch in (*fetches[1:], retry):
        below.answer(fetch, ok=True)
    assert below.planner.poll(lease.id).num_blocks == 4
    below.planner.check()


def test_nothing_is_tried_again_after_the_deadline() -> None:
    below = Below("disk", "other")
    lease = below.planner.prepare_load(below.request, 4, 0.0)

    for fetch in below.fetches():
        below.answer(fetch, ok=False, now=2.5)

    assert below.fetches() == []
    status = below.planner.poll(lease.id)
    assert (status.state, status.num_blocks) == (LeaseState.READY, 0)
    assert below.planner.fetches.counters["load_failures"] == 1


def test_a_fetch_from_a_tier_that_went_down_is_not_waited_for_and_keeps_its_slot() -> None:
    below = Below()
    lease = below.planner.prepare_load(below.request, 4, 0.0)
    fetches = below.fetches()
    below.planner.set_tier_up("disk", False, 0.0)

    assert below.planner.tick(0.0)

    assert below.planner.poll(lease.id).state is LeaseState.READY
    below.planner.complete(lease.id, 0.0)
    assert below.planner.books.host.pool.num_free == 4  # the tier may still write to the others
    for fetch in fetches:
        below.answer(fetch, ok=False)
    assert below.planner.books.host.pool.num_free == 8
    below.planner.check()


def test_a_prefetch_is_bounded_and_goes_after_loads() -> None:
    below = Below(max_prefetch_slots=3)

    below.planner.prefetch(below.request, 0.0)

    fetches = below.fetches()
    assert sum(len(fetch.keys) for fetch in fetches) == below.planner.fetches.prefetching == 3
    assert {fetch.priority for fetch in fetches} == {Priority.PREFETCH}
    land_all(below, fetches)
    assert below.planner.fetches.prefetching == 0
    assert below.planner.lookup(below.again(), 0.0).by_tier == {"host": 3, "disk": 1}


def test_a_prefetch_that_a_load_waits_for_is_promoted_and_not_cancelled() -> None:
    below = Below()
    ticket = below.planner.prefetch(below.request, 0.0)
    fetches = below.fetches()
    below.planner.prepare_load(Request(99, below.request.keys[:2], 9), 2, 0.0)

    promoted = set(below.planner.books.transfers.promoted)

    assert promoted == {fetches[0].id}
    assert below.planner.cancel(ticket) == [fetches[1].id]
    assert below.planner.cancel(ticket) == []


def land_all(below: Below, fetches: list[Transfer]) -> None:
    for fetch in fetches:
        below.answer(fetch, ok=True)
    land(below.planner)


def test_prefetches_that_nobody_cancels_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.plan.fetches.MAX_TICKETS", 3)
    planner, _ = make()

    for seed in range(10):
        planner.prefetch(path(seed, 2), 0.0)

    assert len(planner.fetches._tickets) == 3
