"""The planner against a world of dicts: random requests, leases, outcomes and failures in any order.

The world keeps what every slot and every medium really holds, by page key. So it notices when the planner hands out
a slot whose bytes are another page's, spills a slot that was given away, or forgets one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eviction.lru import Lru
from eviction.registry import make_policy
from eviction.ttl import Ttl
from kvstore.hints.actions import HintKind
from kvstore.hints.outcome import HintStatus
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.page import page_key
from kvstore.plan.loads import load_lease
from kvstore.plan.planner import Planner
from kvstore.plan.records import CutReason, LeaseState, Op, Outcome, PlanSettings, Request, RequestOptions, Transfer
from kvstore.plan.resume import needed_from
from kvstore.plan.state import PageState
from kvstore.plan.steps import at_once
from kvstore.plan.tier_plan import TierPlan
from kvstore.plan.wishes import ALL, Wish
from radix.namespace import BlockHash
from tests.helpers.clocks import Clocks
from tests.helpers.planners import take_small_steps

BLOCK = 4
FULL = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")
HYBRID = Layout(
    BLOCK,
    (
        LayerGroup(GroupKind.FULL, (0,), 4096),
        LayerGroup(GroupKind.SLIDING, (1,), 4096, window=7),  # 2 blocks
    ),
    "test",
    "uint8",
)
SLIDING = Layout(BLOCK, (LayerGroup(GroupKind.SLIDING, (0,), 4096, window=7),), "test", "uint8")  # 2 blocks

PAIRS = Layout(  # pages, and states of two pieces
    BLOCK,
    (
        LayerGroup(GroupKind.FULL, (0,), 4096),
        LayerGroup(GroupKind.RECURRENT, (1,), 4096),
        LayerGroup(GroupKind.RECURRENT, (1,), 4096),
    ),
    "test",
    "uint8",
)
STATES = Layout(BLOCK, PAIRS.groups[1:], "test", "uint8")  # nothing but states

LEASE_S = 10.0

HINTS = [HintKind.PIN, HintKind.RETAIN, HintKind.PREFETCH, HintKind.DEMOTE, HintKind.RELEASE, HintKind.SHARE]

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # one branch a block: 2 children each
flags = st.lists(st.booleans(), min_size=64, max_size=64)


def hashes(prompt: list[int]) -> list[BlockHash]:
    keys, parent = [], b"root"
    for block in prompt:
        parent = hashlib.sha256(parent + bytes([block])).digest()
        keys.append(BlockHash(parent))
    return keys


class Guessing(Lru[Any]):
    """A policy with a forecast, as good as any."""

    def worth(self, keys: list[Any], now: float) -> list[float]:
        return [float(page.block.key[0]) for page in keys]


class PlannerMachine(RuleBasedStateMachine):
    layout = FULL
    policy = "lru"
    all_single_flight = False
    exclusive = False
    max_writes_per_day = 0

    def __init__(self) -> None:
        super().__init__()
        self.clocks = Clocks(100.0)
        self.next_request = 1
        self.media: dict[str, set[bytes]] = {"disk": set(), "redis": set()}
        self.slots: dict[int, bytes | None] = {}
        self.flying: dict[int, Transfer] = {}
        self.loads: list[tuple[Any, Request]] = []
        self.saves: list[tuple[Any, Request]] = []
        self.requests: list[Request] = []
        self.tickets: list[int] = []
        self.claims: dict[bytes, tuple[bytes, float]] = {}  # in Redis: whose, and until when
        self.doomed: dict[str, set[bytes]] = {"disk": set(), "redis": set()}  # forgotten, and not deleted since
        self.forgotten_after = 0  # the last transfer before anything was forgotten last
        self.parents: dict[BlockHash, BlockHash] = {}
        self.published: set[tuple[BlockHash, int]] = set()  # and not forgotten since
        self.leases: dict[tuple[BlockHash, int], float] = {}  # pages that hints pinned, until when
        self.is_lossless = True
        self.is_written_by_others = False

    @property
    def now(self) -> float:
        return self.clocks.now

    @initialize(
        num_slots=st.integers(2, 9),
        disk_pages=st.integers(2, 7),
        admit=st.sampled_from(["always", "second_use", "predicted"]),
        ttl_after=st.sampled_from([{}, {"tool_use": 20.0}]),
    )
    def build(self, num_slots: int, disk_pages: int, admit: str, ttl_after: dict[str, float]) -> None:
        self.num_slots = num_slots
        self.planner = Planner(
            self.layout,
            PlanSettings(
                num_slots,
                batch_pages=2,
                max_prefetch_slots=3,
                touch_interval_s=5.0,
                compute_wait_s=LEASE_S,
                claimer=b"us",
                ttl_after=ttl_after,
            ),
            make_policy(self.policy, 300.0),
            [
                TierPlan(
                    "disk",
                    disk_pages,
                    Ttl(Guessing(), 500.0),
                    True,
                    True,
                    admit,
                    ttl_s=500.0,
                    window_pages=3,
                    exclusive=self.exclusive,
                    max_writes_per_day=self.max_writes_per_day,
                ),
                TierPlan("redis", None, None, False, True, window_pages=3, can_claim=True, can_clear=True),
            ],
            self.clocks,
        )
        self.told = self.planner.told()

    # -- what callers do

    @rule(
        prompt=prompts,
        tail=st.integers(0, BLOCK - 1),
        pin=st.booleans(),
        priority=st.integers(0, 1),
        retain=st.booleans(),
        step_blocks=st.integers(0, 2),
    )
    def new_request(
        self, prompt: list[int], tail: int, pin: bool, priority: int, retain: bool, step_blocks: int
    ) -> None:
        options = RequestOptions(
            pin=pin and self.next_request % 5 == 0,
            priority=priority,
            retain_until=self.clocks.unix + 20 if retain and self.next_request % 3 == 0 else 0.0,
            single_flight=step_blocks > 0 or self.all_single_flight,
            step_blocks=max(1, step_blocks),
        )
        keys = hashes(prompt)
        self.parents.update(zip(keys[1:], keys, strict=False))
        self.requests.append(Request(self.next_request, keys, len(prompt) * BLOCK + tail, options))
        self.next_request += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), is_answered=st.booleans())
    def lookup(self, data: Any, is_answered: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        match = self.planner.lookup(request, self.now)
        self.collect()
        for questions in range(20):
            asked = [t for t in self.flying.values() if t.op in (Op.PROBE, Op.CLAIM)]
            if not is_answered or not asked:
                break
            assert questions < 10, "it asks and asks, and no time passes"
            for transfer in asked:
                self.carry(self.flying.pop(transfer.id), [True] * 64)
            match = self.planner.lookup(request, self.now)
            self.collect()
        assert match.num_blocks * BLOCK < request.num_tokens
        assert sum(match.by_tier.values()) == match.num_blocks
        if match.cut is CutReason.COMPUTING:
            assert match.pending
            assert request.options.single_flight
            claim = self.planner.single_flight.claims.of(request)
            assert claim is None or not claim.is_granted, "it waits, and others wait for it"
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), most=st.integers(0, 6))
    def prepare_load(self, data: Any, most: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        lease = self.planner.prepare_load(request, most, self.now, owner=f"engine-{request.id % 2}")
        assert lease.num_blocks <= most
        self.loads.append((lease, request))
        self.collect()
        self.check_load(lease, request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), first=st.integers(0, 5), num=st.integers(0, 6))
    def prepare_save(self, data: Any, first: int, num: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        states = {first + num - 1} - {-1} if request.id % 2 else {first, first + num - 2}
        owner = f"engine-{request.id % 2}"
        lease = self.planner.prepare_save(request, first, num, self.now, owner, sorted(states))
        self.check_states(lease, states)
        for page in lease.pages:
            assert self.slots.get(page.slot) is None or not self.is_held(page.slot)
            self.slots[page.slot] = None  # the caller is writing: it holds no page now
        self.saves.append((lease, request))
        self.collect()

    @precondition(lambda self: self.saves)
    @rule(data=st.data(), filled=flags)
    def end_save(self, data: Any, filled: list[bool]) -> None:
        lease, request = self.saves.pop(data.draw(st.integers(0, len(self.saves) - 1)))
        filled = filled[: len(lease.pages)]
        for page, ok in zip(lease.pages, filled, strict=True):
            if ok:
                self.slots[page.slot] = page_key(request.keys[page.block], page.group)
        before = self.planner.saver.counters["saved_pages"]
        self.planner.complete(lease.id, self.now, filled)
        self.planner.release(lease.id, self.now)  # a second end is ignored
        if self.planner.saver.counters["saved_pages"] - before == sum(filled):  # else some were forgotten meanwhile
            whole = [page for page, ok in zip(lease.pages, filled, strict=True) if ok]
            self.published.update((request.keys[page.block], page.group) for page in whole)
        self.collect()

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), well=st.booleans())
    def end_load(self, data: Any, well: bool) -> None:
        lease, request = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        self.check_load(lease, request)
        (self.planner.complete if well else self.planner.release)(lease.id, self.now)
        assert self.planner.poll(lease.id).state is LeaseState.CLOSED
        self.collect()

    @rule(engine=st.integers(0, 1))
    def an_engine_dies(self, engine: int) -> None:
        self.planner.release_owner(f"engine-{engine}", self.now)
        self.loads = [(lease, r) for lease, r in self.loads if r.id % 2 != engine]
        self.saves = [(lease, r) for lease, r in self.saves if r.id % 2 != engine]
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), last_turn=st.booleans(), reason=st.sampled_from(["", "tool_calls", "stop"]))
    def finish(self, data: Any, last_turn: bool, reason: str) -> None:
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.planner.finished(request, self.now, finish_reason=reason, last_turn=last_turn)
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), verb=st.sampled_from(["pin", "unpin"]))
    def pin_or_unpin(self, data: Any, verb: str) -> None:
        request = data.draw(st.sampled_from(self.requests))
        getattr(self.planner, verb)(request, self.now)
        if verb == "unpin":
            self.end_leases(request)

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        kind=st.sampled_from(HINTS),
        first=st.integers(0, 3),
        end=st.sampled_from([2, 4, ALL]),
        ttl_s=st.sampled_from([5.0, 50.0, 1e5]),
        session=st.sampled_from(["", "a", "b"]),
        is_own=st.booleans(),
    )
    def hint(self, data: Any, kind: HintKind, first: int, end: int, ttl_s: float, session: str, is_own: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        wish = Wish("", kind, first, end, ttl_s, priority=request.id % 101, session=session, is_own=is_own)
        outcome = self.planner.obey(request, wish, self.now)
        if outcome.status in (HintStatus.REJECTED, HintStatus.IGNORED):
            assert outcome.tokens == 0
        assert outcome.tokens <= len(request.keys) * BLOCK
        if kind is HintKind.RELEASE:
            self.end_leases(request)
        elif kind is HintKind.PIN:
            until = self.clocks.up + min(ttl_s, self.planner.books.settings.hints.max_ttl_s)
            for block in self.planner.books.catalog.match(request.keys)[first:end]:
                for page in block.pages[: self.layout.block_groups] if outcome.tokens else ():
                    if page.kept and until <= self.planner.retention.keeper.until_of(block):
                        self.leases[block.key, page.group] = max(until, self.leases.get((block.key, page.group), 0.0))
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), first=st.integers(0, 5))
    def forget(self, data: Any, first: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.planner.forget(request, first, self.now)
        gone = set(request.keys[first : first + 1])
        while more := {key for key, parent in self.parents.items() if parent in gone} - gone:
            gone |= more
        self.published = {(key, group) for key, group in self.published if key not in gone}
        self.forget_in(("disk", "redis"), request.keys[first:])
        self.collect()

    @rule()
    def clear(self) -> None:
        self.planner.clear(self.now)
        self.published.clear()
        self.forget_in(("redis",), list(self.parents))
        self.collect()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def prefetch(self, data: Any) -> None:
        self.tickets.append(self.planner.prefetch(data.draw(st.sampled_from(self.requests)), self.now))
        self.collect()

    @precondition(lambda self: self.tickets)
    @rule()
    def cancel(self) -> None:
        for transfer_id in self.planner.cancel(self.tickets.pop()):
            transfer = self.flying.pop(transfer_id)
            self.report(transfer, [False] * len(transfer.keys), "cancelled")

    # -- what the world does

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), luck=flags, fails=st.integers(0, 5))
    def a_transfer_ends(self, data: Any, luck: list[bool], fails: int) -> None:
        transfer = self.flying.pop(data.draw(st.sampled_from(sorted(self.flying))))
        if fails == 0:
            self.report(transfer, [False] * len(transfer.keys), "unreachable")
        else:
            self.carry(transfer, luck if fails == 1 else [True] * 64)

    @rule(name=st.sampled_from(["disk", "redis"]), is_up=st.booleans())
    def a_breaker_turns(self, name: str, is_up: bool) -> None:
        self.planner.set_tier_up(name, is_up, self.now)
        self.collect()

    @rule(prompt=prompts, computes=st.booleans())
    def another_machine_claims_and_may_compute(self, prompt: list[int], computes: bool) -> None:
        self.is_written_by_others = self.is_written_by_others or computes
        for key in hashes(prompt):
            name = page_key(key, 0)
            token, until = self.claims.get(name, (b"", 0.0))
            if until <= self.now or token == b"them":
                self.claims[name] = (b"them", self.now + LEASE_S)
                if computes:
                    self.media["redis"].update(page_key(key, group) for group in range(len(self.layout.groups)))

    @rule(name=st.sampled_from(["disk", "redis"]))
    def a_medium_loses_everything(self, name: str) -> None:
        self.media[name].clear()
        self.is_lossless = False

    @rule(seconds=st.sampled_from([0.01, 1.0, 30.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.clocks.advance(seconds)
        self.planner.tick(self.now)
        self.collect()

    @rule(seconds=st.sampled_from([30.0, 400.0, 1e6]))
    def the_machine_sleeps(self, seconds: float) -> None:
        self.clocks.sleep(seconds)

    @rule(seconds=st.sampled_from([-1e6, -400.0, -30.0, 30.0, 400.0, 1e6]))
    def the_wall_clock_is_set(self, seconds: float) -> None:
        self.clocks.set_by(seconds)

    @rule(rate=st.sampled_from([10.0, 1e9]))
    def the_engine_computes(self, rate: float) -> None:
        self.planner.observe_prefill(1000, 1000 / rate)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def its_client_dies(self, data: Any) -> None:
        self.planner.abandon(self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1))), self.now)
        self.collect()

    # -- what must always hold

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "planner"):
            self.planner.check()
            keeper = self.planner.retention.keeper
            assert keeper.num_pages + len(keeper.coming) <= keeper.max_pages, "more is kept than the budget"
            for (key, group), until in list(self.leases.items()):
                block = self.planner.books.catalog.get(key)
                if block is None or until <= self.clocks.up:  # forgotten, or over
                    del self.leases[key, group]
                else:
                    page = block.pages[group]
                    assert page.state is PageState.READY, "a page has left before its lease ended"
                    assert page.pins, "a page may leave before its lease ends"
            for lease, request in self.loads:
                self.check_load(lease, request)

    def teardown(self) -> None:
        if not hasattr(self, "planner"):
            return
        for lease, _ in [*self.loads, *self.saves]:
            self.planner.release(lease.id, self.now)
        self.loads, self.saves = [], []
        self.collect()
        for _ in range(10_000):
            if not self.flying:
                break
            self.carry(self.flying.pop(min(self.flying)), [True] * 64)
        self.planner.check()
        assert not self.flying
        assert self.planner.books.host.num_filling == 0
        kept = self.planner.books.host.num_resident - len(self.planner.books.host.policy)
        assert (kept == 0) == (len(self.planner.retention.keeper) == 0)
        self.the_last_request_gets_its_turn()
        self.what_was_forgotten_is_gone_and_a_flush_is_right()
        self.every_lease_ends()

    def every_lease_ends(self) -> None:
        self.clocks.advance(self.planner.books.settings.pin_max_s)
        self.planner.tick(self.now)
        self.planner.check()
        retention = self.planner.retention
        assert (retention.keeper.num_pages, len(retention.keeper), len(retention.raises)) == (0, 0, 0)
        assert not retention.keeper.coming
        assert not retention.demotions.leaving

    def the_last_request_gets_its_turn(self) -> None:
        """When all others have gone, in whatever way, none waits for ever."""
        for request in self.requests[:-1]:
            self.planner.finished(request, self.now)
        for request in self.requests[-1:]:
            for wait_s in (LEASE_S, LEASE_S, LEASE_S, 0.0, 0.0, 0.0):  # the last ones leave time for questions only
                self.clocks.advance(wait_s)
                self.planner.tick(self.now)
                match = self.planner.lookup(request, self.now)
                self.collect()
                for _ in range(1000):
                    if self.flying:
                        self.carry(self.flying.pop(min(self.flying)), [True] * 64)
                assert not self.flying
            assert not match.pending
            self.planner.finished(request, self.now)
        self.planner.tick(self.now + LEASE_S)
        assert len(self.planner.single_flight.claims) == 0, "a claim has outlived its maker"

    def what_was_forgotten_is_gone_and_a_flush_is_right(self) -> None:
        for name in self.media:
            self.planner.set_tier_up(name, True, self.now)
        for _ in range(3):
            self.clocks.advance(60.0)  # the longest that a delete is not tried again
            self.planner.tick(self.now)
            self.planner.flushing().is_over(self.now)
            self.planner.flushing().is_over(self.now)
            self.collect()
            for _ in range(10_000):
                if not self.flying:
                    break
                self.carry(self.flying.pop(min(self.flying)), [True] * 64)
        self.planner.check()
        assert self.doomed == {"disk": set(), "redis": set()}, "a delete was forgotten"
        result = self.planner.flush_result(self.told)
        assert result.undeleted == {}
        whys = {"lost", "budget"} if self.max_writes_per_day else {"lost"}
        assert {why for counts in result.missing.values() for why in counts} <= whys
        if self.is_lossless and "redis" not in result.missing:
            names = {page_key(key, group) for key, group in self.published}
            assert names <= self.media["redis"], "a flush passed over what was not written"

    # -- helpers

    def end_leases(self, request: Request) -> None:
        """The model says nothing more of leases that may have been taken back."""
        for key in request.keys:
            for group in range(len(self.layout.groups)):
                self.leases.pop((key, group), None)

    def forget_in(self, tiers: tuple[str, ...], keys: list[BlockHash]) -> None:
        names = {page_key(key, group) for key in keys for group in range(len(self.layout.groups))}
        for name in tiers:
            self.doomed[name] |= names
        self.forgotten_after = max([*self.flying, self.forgotten_after])

    def collect(self) -> None:
        for transfer in self.planner.take_transfers():
            assert transfer.id not in self.flying
            self.flying[transfer.id] = transfer
            if transfer.op is Op.FETCH:
                for slot in transfer.slots:
                    self.slots[slot] = None

    def carry(self, transfer: Transfer, luck: list[bool]) -> None:
        medium = self.media[transfer.tier]
        ok: list[bool] = []
        match transfer.op:
            case Op.FETCH:
                for key, slot, lucky in zip(transfer.keys, transfer.slots, luck, strict=False):
                    found = key in medium and lucky
                    if found:
                        self.slots[slot] = key
                    ok.append(found)
            case Op.SPILL:
                medium.difference_update(transfer.evict)
                if transfer.id > self.forgotten_after:
                    assert self.doomed[transfer.tier].isdisjoint(transfer.keys), "a write has overtaken a delete"
                for key, slot, lucky in zip(transfer.keys, transfer.slots, luck, strict=False):
                    assert self.slots[slot] == key, "a slot was given away while it was being written behind"
                    if lucky:
                        medium.add(key)
                    ok.append(lucky)
            case Op.PROBE | Op.TOUCH:
                ok = [key in medium for key in transfer.keys]
            case Op.DELETE:
                medium.difference_update(transfer.keys)
                self.doomed[transfer.tier].difference_update(transfer.keys)
                ok = [True] * len(transfer.keys)
            case Op.CLEAR:
                medium.clear()
                self.doomed[transfer.tier].clear()
            case Op.CLAIM:
                for key in transfer.keys:
                    token, until = self.claims.get(key, (b"", 0.0))
                    ok.append(until <= self.now or token == transfer.token)
                    if ok[-1]:
                        self.claims[key] = (transfer.token, self.now + transfer.lease_s)
                    if not ok[0]:
                        ok += [False] * (len(transfer.keys) - len(ok))
                        break
            case Op.UNCLAIM:
                for key in transfer.keys:
                    if self.claims.get(key, (b"", 0.0))[0] == transfer.token:
                        del self.claims[key]
                ok = [True] * len(transfer.keys)
        self.report(transfer, ok, None)

    def report(self, transfer: Transfer, ok: list[bool], error: str | None) -> None:
        seconds = 0.0 if error else 0.001
        self.planner.outcome(Outcome(transfer.id, tuple(ok), seconds, 4096 * sum(ok), error), self.now)
        self.collect()

    def check_load(self, lease: Any, request: Request) -> None:
        status = self.planner.poll(lease.id)
        assert status.num_blocks <= lease.num_blocks
        windows = [self.layout.window_blocks(group) for group in range(len(self.layout.groups))]
        slots = {(page.block, page.group): page.slot for page in lease.pages}
        for group, window in enumerate(windows):
            for block in range(needed_from(status.num_blocks, window), status.num_blocks):
                slot = slots[block, group]  # every page of a resume point is in the lease
                assert self.slots[slot] == page_key(request.keys[block], group), "wrong page in a slot"

    def check_states(self, lease: Any, states: set[int]) -> None:
        """A save has slots for the states that were asked for only, and for no part of what is missing of one."""
        num_groups = self.layout.block_groups
        for block in {page.block for page in lease.pages if page.group >= num_groups}:
            assert block in states, "a state that there is not is to be saved"

    def is_held(self, slot: int) -> bool:
        return any(page.slot == slot for lease, _ in self.loads for page in lease.pages if self.is_live(lease, page))

    def is_live(self, lease: Any, page: Any) -> bool:
        load = self.planner.loader.loads[lease.id]
        return any(own.slot == page.slot for own in load.pages if own not in load.lost)


class HybridMachine(PlannerMachine):
    layout = HYBRID


class SlidingMachine(PlannerMachine):
    layout = SLIDING


class PairsMachine(PlannerMachine):
    layout = PAIRS


class StatesMachine(PlannerMachine):
    layout = STATES


class SingleFlightMachine(PlannerMachine):
    all_single_flight = True


class OutlookMachine(PlannerMachine):
    """The policy remembers requests, and blocks that are nowhere."""

    policy = "outlook"


class SieveMachine(PlannerMachine):
    policy = "sieve"


class ExclusiveMachine(PlannerMachine):
    exclusive = True


class BudgetMachine(PlannerMachine):
    max_writes_per_day = 24 * 4096 * 8


STEPPED = ["prepare_load", "prepare_save", "forget", "finished", "set_ttl", "pin", *HINTS]


class SteppedMachine(PlannerMachine):
    """Steps of one or two pages, and anything between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        take_small_steps(self.patch, blocks=1, pages=2)
        self.running: list[tuple[str | HintKind, int, Any, Any]] = []  # verb, lease, steps, request

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        verb=st.sampled_from(["prepare_load", "prepare_save", "forget", "finished", "set_ttl", "pin", *HINTS]),
    )
    def begin(self, data: Any, verb: str | HintKind) -> None:
        request = data.draw(st.sampled_from(self.requests))
        in_steps, lease_id = self.planner.in_steps, self.planner.in_steps.new_lease_id()
        owner = f"engine-{request.id % 2}"
        steps: Any
        if verb == "prepare_load":
            steps = in_steps.prepare_load(lease_id, request, len(request.keys), self.now, owner, 0)
        elif verb == "prepare_save":
            steps = in_steps.prepare_save(
                lease_id, request, 0, len(request.keys), self.now, owner, [len(request.keys) - 1]
            )
        elif verb == "forget":
            self.is_written_by_others = False
            self.published.clear()
            steps = in_steps.forget(request, 0, self.now)
        elif verb == "finished":
            steps = in_steps.finished(request, self.now, last_turn=request.id % 2 == 0)
        elif verb == "set_ttl":
            steps = in_steps.set_ttl(request, 200.0, self.now)
        elif isinstance(verb, HintKind):
            if verb is HintKind.RELEASE:
                self.end_leases(request)
            wish = Wish("", verb, ttl_s=50.0, priority=50, is_own=request.id % 2 == 0)
            steps = self.planner.hints.obey(lease_id, request, wish, self.now)
        else:
            steps = in_steps.pin(request)
        self.go(verb, lease_id, steps, request)

    @precondition(lambda self: self.loads or self.saves)
    @rule(data=st.data(), well=st.booleans())
    def begin_an_end(self, data: Any, well: bool) -> None:
        lease, request = data.draw(st.sampled_from([*self.loads, *self.saves]))
        if (lease, request) in self.saves:
            for page in lease.pages:
                self.slots[page.slot] = page_key(request.keys[page.block], page.group)
        self.loads = [pair for pair in self.loads if pair[0] is not lease]
        self.saves = [pair for pair in self.saves if pair[0] is not lease]
        verb = self.planner.in_steps.complete if well else self.planner.in_steps.release
        self.go("end", lease.id, verb(lease.id, self.now), request)

    @rule()
    def begin_a_clear(self) -> None:
        self.published.clear()
        self.go("clear", 0, self.planner.in_steps.clear(self.now), None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def go_on(self, data: Any) -> None:
        self.go(*self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_caller_is_interrupted_between_two_steps(self, data: Any) -> None:
        verb, lease_id, _, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if verb in ("prepare_load", "prepare_save"):
            self.planner.release(lease_id, self.now)
        self.collect()

    def go(self, verb: str | HintKind, lease_id: int, steps: Any, request: Any) -> None:
        try:
            next(steps)
            self.running.append((verb, lease_id, steps, request))
        except StopIteration as over:
            self.book(verb, over.value, request)
        self.collect()

    def book(self, verb: str | HintKind, answer: Any, request: Any) -> None:
        if verb == "prepare_load" and self.planner.poll(answer.id).state is not LeaseState.CLOSED:
            lease = load_lease(answer, BLOCK)
            self.loads.append((lease, request))
            self.check_load(lease, request)
        elif verb == "prepare_save" and answer.id in self.planner.saver.saves:
            for page in answer.pages:
                self.slots[page.slot] = None
            self.saves.append((answer, request))
        elif verb == "forget" and not self.is_written_by_others:
            for tier in self.planner.books.tiers:
                for key in request.keys:
                    names = {page_key(key, group) for group in range(len(self.layout.groups))}
                    left = names & self.media[tier.plan.name]
                    assert self.planner.books.catalog.get(key) is None
                    assert all(tier.deletes.holds(name) for name in left), "it was forgotten, and is still there"

    def teardown(self) -> None:
        if hasattr(self, "planner"):
            for _, _, steps, _ in self.running:
                at_once(steps)
            for leases in (self.planner.loader.loads, self.planner.saver.saves):
                for lease_id in list(leases):
                    self.planner.release(lease_id, self.now)
        self.collect()
        super().teardown()
        self.patch.undo()


def _case(machine: type[PlannerMachine], examples: int) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    return case


TestPlanner = _case(PlannerMachine, 150)
TestPlannerWithSlidingGroup = _case(HybridMachine, 150)
TestPlannerOfWindowsOnly = _case(SlidingMachine, 100)
TestPlannerOfPagesAndStates = _case(PairsMachine, 150)
TestPlannerOfStatesOnly = _case(StatesMachine, 60)
TestPlannerOfSingleFlights = _case(SingleFlightMachine, 100)
TestPlannerInSteps = _case(SteppedMachine, 150)
TestPlannerWithSieve = _case(SieveMachine, 50)
TestPlannerWithOutlook = _case(OutlookMachine, 25)
TestPlannerOfAnExclusiveTier = _case(ExclusiveMachine, 100)
TestPlannerWithWriteBudget = _case(BudgetMachine, 50)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestPlannerLong(PlannerMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(TestPlanner.settings, max_examples=3000, stateful_step_count=200)


class Dice:
    """Draws as hypothesis' `data` does, by plain chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def draw(self, strategy: Any) -> Any:
        inner = getattr(strategy, "wrapped_strategy", strategy)
        if hasattr(inner, "elements"):
            return self.random.choice(inner.elements)
        return inner.value if hasattr(inner, "value") else self.random.randint(0, inner.end)

    def flags(self) -> list[bool]:
        return [self.random.random() < 0.8 for _ in range(64)]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("machine", [PlannerMachine, HybridMachine, PairsMachine])
def test_a_long_history_of_writes_deletes_and_outages_keeps_their_order(
    machine: type[PlannerMachine], seed: int
) -> None:
    """Hypothesis seldom gets as far as a delete that fails while its key is saved again; weighted chance does."""
    dice, world = Dice(seed), machine()
    chance = dice.random
    world.build(num_slots=chance.randint(4, 9), disk_pages=chance.randint(4, 9), admit="always", ttl_after={})

    def new_request() -> None:
        prompt = [chance.randint(0, 1) for _ in range(chance.randint(1, 4))]
        world.new_request(prompt=prompt, tail=1, pin=False, priority=0, retain=False, step_blocks=0)

    def transfer_ends() -> None:
        world.a_transfer_ends(data=dice, luck=dice.flags(), fails=chance.randint(0, 5))

    def breaker_turns() -> None:
        world.a_breaker_turns(name=chance.choice(["disk", "redis"]), is_up=chance.random() < 0.7)

    def save() -> None:
        world.prepare_save(data=dice, first=0, num=4)

    steps: list[tuple[float, Callable[[], object], Callable[[], object]]] = [
        (2, new_request, lambda: True),
        (4, save, lambda: world.requests),
        (4, lambda: world.end_save(data=dice, filled=dice.flags()), lambda: world.saves),
        (2, lambda: world.lookup(data=dice, is_answered=True), lambda: world.requests),
        (1, lambda: world.prepare_load(data=dice, most=4), lambda: world.requests),
        (2, lambda: world.end_load(data=dice, well=True), lambda: world.loads),
        (12, transfer_ends, lambda: world.flying),
        (2, lambda: world.forget(data=dice, first=chance.randint(0, 2)), lambda: world.requests),
        (0.1, world.clear, lambda: True),
        (0.5, breaker_turns, lambda: True),
        (2, lambda: world.time_passes(seconds=chance.choice([0.01, 1.0, 30.0])), lambda: True),
        (0.3, lambda: world.the_wall_clock_is_set(seconds=chance.choice([-1e6, -400.0, 400.0, 1e6])), lambda: True),
        (1, lambda: world.finish(data=dice, last_turn=False, reason=""), lambda: len(world.requests) > 4),
    ]  # fmt: skip
    for _ in range(250):
        (step,) = chance.choices(steps, [weight if is_possible() else 0 for weight, _, is_possible in steps])
        step[1]()
        world.the_books_are_right()
    world.teardown()
