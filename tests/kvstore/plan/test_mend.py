"""The books after an exception at any line of a planner's method, once they are mended.

Each verb is called again and again on a planner made anew; in the n-th round an exception is raised at the n-th line
that it executes, until a round gets through. After it the invariants hold, nothing is leased, filling or under way, and
the media hold what the books say.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.flushing import Flushing, Told, report, told_of
from kvstore.plan.journal import Journal
from kvstore.plan.planner import Planner
from kvstore.plan.records import FlushResult, Op, Outcome, PlanSettings, Request, RequestOptions
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.interrupts import interrupted_at
from tests.helpers.planners import BLOCK, land, make, path, publish, save, take_small_steps

WINDOWED = Layout(
    BLOCK,
    (LayerGroup(GroupKind.FULL, (0,), 4096), LayerGroup(GroupKind.SLIDING, (1,), 4096, window=7)),
    "test",
    "uint8",
)
SIMPLE = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")


class World:
    """A planner, and media that do what they are told."""

    def __init__(self, layout: Layout, policy: str) -> None:
        self.media: dict[str, set[bytes]] = {"disk": set(), "redis": set()}
        tiers = [
            TierPlan("disk", 14, make_policy(policy, 3600.0), is_indexed=True, is_shared=False),
            TierPlan("redis", None, None, is_indexed=False, is_shared=True, can_claim=True),
        ]
        settings = PlanSettings(8 * len(layout.groups), load_or_recompute=False, batch_pages=3, compute_wait_s=10.0)
        self.planner = Planner(layout, settings, make_policy(policy, 3600.0), tiers)
        self.planner.books.catalog.journal = Journal(lambda: 1000.0)
        self.now = 1.0

    def land(self) -> None:
        """Every transfer is carried."""
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                medium = self.media[transfer.tier]
                ok = [True] * len(transfer.keys)
                if transfer.op is Op.SPILL:
                    medium -= set(transfer.evict)
                    medium |= set(transfer.keys)
                elif transfer.op is Op.DELETE:
                    medium -= set(transfer.keys)
                elif transfer.op is Op.CLEAR:
                    medium.clear()
                elif transfer.op in (Op.FETCH, Op.PROBE, Op.TOUCH):
                    ok = [key in medium for key in transfer.keys]
                self.planner.outcome(Outcome(transfer.id, tuple(ok), 0.001, 1), self.now)

    def use(self, request: Request) -> int:
        """Look up, load, save the rest, finish; returns the blocks loaded."""
        planner = self.planner
        while (match := planner.lookup(request, self.now)).pending:
            self.land()
        lease = planner.prepare_load(request, match.num_blocks, self.now)
        self.land()
        loaded = planner.poll(lease.id).num_blocks
        planner.complete(lease.id, self.now)
        saving = planner.prepare_save(request, 0, len(request.keys), self.now)
        planner.complete(saving.id, self.now)
        planner.finished(request, self.now)
        self.land()
        return loaded

    def look(self) -> None:
        """What must hold when nothing is under way."""
        planner = self.planner
        planner.check()
        assert planner.num_leases == 0
        assert planner.books.host.num_filling == 0
        assert len(planner.books.transfers) == 0
        assert all(tier.is_settled(self.now) for tier in planner.books.tiers)
        disk = planner.books.tiers[0]
        booked = {page.key for page in planner.books.catalog.pages() if disk.has(page)}
        assert self.media["disk"] == booked, f"{len(self.media['disk'])} on disk, {len(booked)} booked"
        assert disk.plan.policy is not None
        assert len(disk.plan.policy) == len(booked)
        for block in planner.books.catalog.blocks():
            assert block.parent is None or planner.books.catalog.get(block.parent.key) is block.parent
            assert not block.is_removed


@pytest.fixture(autouse=True)
def no_worlds_left() -> Iterator[None]:
    """Hundreds of planners are made; the collector counts their objects, not the megabytes of a policy's tables."""
    yield
    gc.collect()


def branch(request: Request, at: int, seed: int) -> Request:
    """A request that shares `at` blocks."""
    other = path(seed, len(request.keys) - at)
    return Request(other.id, [*request.keys[:at], *other.keys], request.num_tokens, RequestOptions())


KNOWN, BELOW, NEW = path(1, 5), path(2, 5), path(3, 6)
KEPT = Request(91, KNOWN.keys, KNOWN.num_tokens, RequestOptions(pin=True, priority=2, ttl_s=60.0))
FLYING = Request(92, NEW.keys, NEW.num_tokens, RequestOptions(single_flight=True))

VERBS: dict[str, Callable[[World], object]] = {
    "lookup": lambda w: w.planner.lookup(KNOWN, w.now),
    "lookup of what is below": lambda w: w.planner.lookup(BELOW, w.now),
    "lookup in single flight": lambda w: w.planner.lookup(FLYING, w.now),
    "prepare_save": lambda w: w.planner.prepare_save(NEW, 0, 6, w.now),
    "prepare_save of a branch": lambda w: w.planner.prepare_save(branch(KNOWN, 2, 9), 0, 5, w.now),
    "prepare_load": lambda w: w.planner.prepare_load(KNOWN, 5, w.now),
    "prepare_load from below": lambda w: w.planner.prepare_load(BELOW, 5, w.now),
    "prefetch": lambda w: w.planner.prefetch(BELOW, w.now),
    "finished": lambda w: w.planner.finished(KNOWN, w.now, finish_reason="stop", last_turn=True),
    "finished with a pin": lambda w: w.planner.finished(KEPT, w.now),
    "pin": lambda w: w.planner.pin(KNOWN, w.now),
    "forget": lambda w: w.planner.forget(KNOWN, 1, w.now),
    "clear": lambda w: w.planner.clear(w.now),
    "set_ttl": lambda w: w.planner.set_ttl(KNOWN, 30.0, w.now),
    "resize_host": lambda w: w.planner.resize_host(6),  # three blocks of two groups fit
    "tick when all expires": lambda w: w.planner.tick(w.now + 10_000.0),
}
ENDS: dict[str, Callable[[World, int], object]] = {
    "complete": lambda w, lease: w.planner.complete(lease, w.now),
    "release": lambda w, lease: w.planner.release(lease, w.now),
}


def made(layout: Layout, policy: str) -> World:
    """Two prompts and a branch, in more pages than host memory has."""
    world = World(layout, policy)
    for request in (BELOW, KNOWN, branch(KNOWN, 3, 7)):
        world.use(request)
    return world


def mend(world: World, last_lease: int, where: list[str]) -> None:
    """What the next step does (see dispatcher.py), if the last one was interrupted."""
    if where:
        world.planner.mend(last_lease, world.now)
        world.planner.check()


STEP = 7 if not os.environ.get("KV_EVERY_LINE") else 1  # of each worldly variety another seventh of the lines


@pytest.mark.parametrize("policy", ["lru", "outlook", "sieve", "s3fifo"])
@pytest.mark.parametrize("name", VERBS)
def test_a_verb_that_is_interrupted_at_any_line_leaves_nothing_behind(name: str, policy: str) -> None:
    for layout in (SIMPLE, WINDOWED):
        first = 1 + (len(policy) + len(layout.groups)) % STEP
        for n in range(first, 100_000, STEP):
            world = made(layout, policy)
            last_lease = world.planner.in_steps.last_lease
            with interrupted_at(n) as where:
                done: Any = VERBS[name](world)
            try:
                mend(world, last_lease, where)
                if not where and hasattr(done, "pages"):
                    world.planner.release(done.id, world.now)
                world.land()
                world.look()
                world.planner.unpin(KNOWN, world.now)
                assert world.use(path(50, 3)) == 0
                assert world.use(path(50, 3)) == 3
                world.look()
            except BaseException as error:
                raise AssertionError(f"{name} with {policy}, interrupted at {where}") from error
            if not where:
                break
        assert n > 5


@pytest.mark.parametrize(
    "name", sorted(VERBS.keys() - {"lookup", "lookup of what is below", "lookup in single flight"})
)
def test_a_verb_of_many_steps_that_is_interrupted_in_any_of_them_leaves_nothing_behind(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_small_steps(monkeypatch)
    for n in range(1, 100_000, 3 * STEP):
        world = made(WINDOWED, "lru")
        last_lease = world.planner.in_steps.last_lease
        with interrupted_at(n) as where:
            done: Any = VERBS[name](world)
        try:
            mend(world, last_lease, where)
            if not where and hasattr(done, "pages"):
                world.planner.release(done.id, world.now)
            world.land()
            world.look()
        except BaseException as error:
            raise AssertionError(f"{name}, interrupted at {where}") from error
        if not where:
            break


@pytest.mark.parametrize("policy", ["lru", "sieve"])
@pytest.mark.parametrize("prepare", ["prepare_save", "prepare_load", "prepare_load from below"])
@pytest.mark.parametrize("end", ENDS)
def test_a_lease_whose_end_is_interrupted_is_over_or_can_be_ended_again(prepare: str, end: str, policy: str) -> None:
    for n in range(1, 100_000, STEP):
        world = made(SIMPLE, policy)
        lease: Any = VERBS[prepare](world)
        if prepare != "prepare_save":
            world.land()
        last_lease = world.planner.in_steps.last_lease
        with interrupted_at(n) as where:
            ENDS[end](world, lease.id)
        try:
            mend(world, last_lease, where)
            ENDS[end](world, lease.id)
            world.land()
            world.look()
        except BaseException as error:
            raise AssertionError(f"{end} after {prepare}, interrupted at {where}") from error
        if not where:
            break
    assert n > 5


@pytest.mark.parametrize("prepare", ["prepare_save", "prepare_load", "prepare_load from below"])
@pytest.mark.parametrize("end", ENDS)
def test_an_end_of_many_steps_that_is_interrupted_in_any_of_them_goes_on_with_a_tick(
    prepare: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_small_steps(monkeypatch)
    num_ended = 0
    for n in range(1, 100_000, STEP):
        world = made(SIMPLE, "lru")
        planner = world.planner
        lease: Any = VERBS[prepare](world)
        if prepare != "prepare_save":
            world.land()
        last_lease = planner.in_steps.last_lease
        with interrupted_at(n) as where:
            ENDS[end](world, lease.id)
        try:
            mend(world, last_lease, where)
            planner.tick(world.now)
            num_ended += planner.num_leases == 0
            ENDS[end](world, lease.id)  # of those that had not begun to end
            world.land()
            world.look()
        except BaseException as error:
            raise AssertionError(f"{end} after {prepare}, interrupted at {where}") from error
        if not where:
            break
    assert num_ended > 5


@pytest.mark.parametrize("op", [Op.FETCH, Op.SPILL, Op.PROBE, Op.DELETE])
def test_an_outcome_whose_booking_is_interrupted_is_not_waited_for(op: Op) -> None:
    for n in range(1, 100_000, STEP):
        world = made(SIMPLE, "lru")
        planner = world.planner
        if op is Op.FETCH:
            lease = planner.prepare_load(BELOW, 5, world.now)
        elif op is Op.SPILL:
            planner.complete(planner.prepare_save(NEW, 0, 6, world.now).id, world.now)
        elif op is Op.PROBE:
            planner.lookup(NEW, world.now)
        else:
            planner.forget(KNOWN, 0, world.now)
        transfers = planner.take_transfers()
        first = next(transfer for transfer in transfers if transfer.op is op)
        medium = world.media[first.tier]
        if op is Op.SPILL:
            medium -= set(first.evict)
            medium |= set(first.keys)
        elif op is Op.DELETE:
            medium -= set(first.keys)
        last_lease = planner.in_steps.last_lease
        with interrupted_at(n) as where:
            planner.outcome(Outcome(first.id, (True,) * len(first.keys), 0.001, 1), world.now)
        try:
            mend(world, last_lease, where)
            planner.outcome(Outcome(first.id, (True,) * len(first.keys), 0.001, 1), world.now)  # again, see dispatcher
            rest = [transfer for transfer in transfers if transfer is not first]
            planner.books.transfers.outbox[:0] = rest
            world.land()
            if op is Op.FETCH:
                assert not planner.is_waiting(lease.id)
                planner.complete(lease.id, world.now)
                world.land()
            planner.check()
            assert planner.num_leases == planner.books.host.num_filling == len(planner.books.transfers) == 0
        except BaseException as error:
            raise AssertionError(f"{op}, interrupted at {where}") from error
        if not where:
            break


def test_mending_that_is_interrupted_itself_begins_anew() -> None:
    for n in range(1, 100_000, 3 * STEP):
        world = made(SIMPLE, "lru")
        last_lease = world.planner.in_steps.last_lease
        with interrupted_at(150) as where:
            world.planner.prepare_save(NEW, 0, 6, world.now)
        assert where
        with interrupted_at(n) as again:
            world.planner.mend(last_lease, world.now)
        mend(world, last_lease, where)
        world.land()
        world.look()
        if not again:
            break


def test_mending_what_is_whole_changes_nothing_that_matters() -> None:
    world = made(SIMPLE, "lru")
    planner = world.planner
    lease = planner.prepare_load(KNOWN, 5, world.now)
    world.land()
    slots = {page.key: page.slot for page in planner.books.catalog.pages()}
    order = [page.key for page in planner.books.host.policy.victims(100)]

    planner.mend(planner.in_steps.last_lease, world.now)

    assert {page.key: page.slot for page in planner.books.catalog.pages()} == slots
    assert [page.key for page in planner.books.host.policy.victims(100)] == order
    assert planner.poll(lease.id).num_blocks == 5
    planner.complete(lease.id, world.now)
    world.land()
    world.look()


def flushed(planner: Planner, told: Told) -> FlushResult:
    """What a flush says when its transfers have landed."""
    flushing = Flushing(planner.books.tiers)
    for _ in range(5):
        if flushing.is_over(0.0):
            break
        land(planner)
    return report(planner.books.tiers, told)


def test_a_flush_does_not_pass_over_a_save_whose_end_was_interrupted() -> None:
    for n in range(1, 100_000, STEP):
        planner, _ = make(num_slots=16, disk_pages=16)
        planner.set_tier_up("disk", False, 0.0)
        told = told_of(planner.books.tiers)
        lease = planner.prepare_save(KNOWN, 0, 5, 0.0)
        last_lease = planner.in_steps.last_lease
        with interrupted_at(n) as where:
            planner.complete(lease.id, 0.0)
        if where:
            planner.mend(last_lease, 0.0)
            planner.complete(lease.id, 0.0)
        is_there = len(planner.books.catalog.match(KNOWN.keys)) > 0
        assert bool(flushed(planner, told)) is not is_there, f"interrupted at {where}"
        if not where:
            break
    assert n > 5


def test_a_flush_misses_nothing_that_is_there_after_the_booking_of_a_delete_was_interrupted() -> None:
    for n in range(1, 100_000):
        planner, _ = make(num_slots=16, disk_pages=16)
        save(planner, KNOWN)
        planner.forget(KNOWN, 0, 0.0)
        publish(planner, KNOWN)  # its pages are held until the delete is done
        told = told_of(planner.books.tiers)
        (delete,) = planner.take_transfers()
        done = Outcome(delete.id, (True,) * len(delete.keys), 0.001, 1)
        with interrupted_at(n) as where:
            planner.outcome(done, 0.0)
        if where:
            planner.mend(planner.in_steps.last_lease, 0.0)
            planner.outcome(done, 0.0)  # again, see dispatcher
        land(planner)
        result = flushed(planner, told)
        assert result, f"{result}, interrupted at {where}"
        if not where:
            break
    assert n > 5
