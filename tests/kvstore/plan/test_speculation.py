"""Speculation: pages of idle sessions come back before their next turn, within budgets, and only while it pays."""

from __future__ import annotations

import random

import pytest

from eviction.policy import Ending
from eviction.registry import make_policy
from kvstore.clock import Clock
from kvstore.plan import speculation as module
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Priority, Request, RequestOptions, SpeculationSettings
from kvstore.plan.speculation import MAX_HASHES, MAX_SESSIONS, Speculation
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash
from tests.helpers.planners import BLOCK, LAYOUT

PAGE_BYTES = LAYOUT.stored_bytes(0)
AUTO = SpeculationSettings("auto", max_slots=16, bytes_per_s=1000.0 * PAGE_BYTES, max_waste=1.0)


class World:
    """A planner over a disk, and sessions of four blocks; time is moved by hand.

    served: the blocks of the last turn by tier.
    """

    def __init__(self, settings: SpeculationSettings | None = AUTO, num_slots: int = 64) -> None:
        self.now = 100.0
        clock = Clock(wall=lambda: self.now, steady=lambda: self.now, boot=lambda: self.now)
        disk = TierPlan("disk", 4096, make_policy("lru"), is_indexed=True, is_shared=False, window_pages=4096)
        plan = PlanSettings(num_slots, load_or_recompute=False, speculation=settings)
        self.planner = Planner(LAYOUT, plan, make_policy("lru"), [disk], clock)
        self.fails = False
        self.fetched: list[tuple[bytes, ...]] = []
        self._ids = 0

    @property
    def speculation(self) -> Speculation:
        assert self.planner.speculation is not None
        return self.planner.speculation

    def request(self, name: str, num_blocks: int = 4, *, tenant: str = "", session: str | None = None) -> Request:
        self._ids += 1
        keys = [BlockHash(f"{tenant}/{name}/{block}".encode().ljust(32, b".")) for block in range(num_blocks)]
        options = RequestOptions(session=name if session is None else session)
        return Request(self._ids, keys, num_blocks * BLOCK + 1, options)

    def turn(self, request: Request, reason: str = "stop", *, last_turn: bool = False) -> dict[str, int]:
        """Look up, load, save, finish; returns the blocks of the hit by tier."""
        match = self.planner.lookup(request, self.now)
        if match.num_blocks:
            lease = self.planner.prepare_load(request, match.num_blocks, self.now)
            self.carry()
            self.planner.complete(lease.id, self.now)
        lease2 = self.planner.prepare_save(request, match.num_blocks, len(request.keys), self.now)
        self.planner.complete(lease2.id, self.now)
        self.planner.finished(request, self.now, finish_reason=reason, last_turn=last_turn)
        self.carry()
        return match.by_tier

    def carry(self) -> None:
        while transfers := self.planner.take_transfers():
            for transfer in transfers:
                ahead = transfer.op is Op.FETCH and transfer.priority is Priority.PREFETCH
                if ahead:
                    self.fetched.append(tuple(transfer.keys))
                ok = not (ahead and self.fails)
                self.planner.outcome(Outcome(transfer.id, (ok,) * len(transfer.keys), 0.001, 4096), self.now)

    def wait(self, seconds: float, step: float = 1.0) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + step)
            self.planner.tick(self.now)
            self.carry()
        self.planner.check()

    def push_out(self) -> None:
        """Host memory loses all that the disk has, so there is room."""
        host = self.planner.books.host
        host.drop([page for page in self.planner.books.catalog.pages() if page in host.policy])

    def learn(self, gap_s: float = 100.0, turns: int = 40) -> None:
        """Teach it that sessions return after `gap_s`."""
        for _ in range(turns):
            self.turn(self.request("teacher"))
            self.wait(gap_s, 10.0)

    @property
    def num_fetched(self) -> int:
        return sum(len(keys) for keys in self.fetched)


def test_a_session_is_brought_before_it_returns_and_its_next_turn_hits_host_memory() -> None:
    world = World()
    world.learn()
    world.turn(world.request("reader"))
    world.wait(20.0)
    world.push_out()

    world.wait(75.0)

    assert world.turn(world.request("reader")) == {"host": 4}
    assert world.speculation.counters["used"] >= 4


def test_without_speculation_the_same_turn_comes_from_disk_and_the_planner_has_none() -> None:
    world = World(None)
    world.learn()
    world.turn(world.request("reader"))
    world.push_out()

    world.wait(95.0)

    assert world.planner.speculation is None
    assert world.num_fetched == 0
    assert world.turn(world.request("reader")) == {"disk": 4}


def test_a_session_without_a_name_is_found_by_the_end_of_its_path() -> None:
    world = World()
    for _ in range(40):
        world.turn(world.request("chat", session=""))
        world.wait(100.0, 10.0)
    world.turn(world.request("chat", 4, session=""))
    world.push_out()

    world.wait(95.0)

    assert world.turn(world.request("chat", 6, session="")) == {"host": 4}


def test_after_a_last_turn_nothing_is_brought() -> None:
    world = World()
    world.learn()
    world.wait(20_000.0, 500.0)
    world.fetched.clear()
    world.turn(world.request("reader"), last_turn=True)
    world.push_out()

    world.wait(95.0)

    assert world.num_fetched == 0


def test_pages_of_a_session_that_were_deleted_are_not_brought() -> None:
    world = World()
    world.learn()
    request = world.request("reader")
    world.turn(request)
    world.push_out()
    world.planner.forget(request, 0, world.now)
    world.carry()

    world.wait(95.0)

    assert not any(key[:32] in {bytes(k) for k in request.keys} for keys in world.fetched for key in keys)


def test_two_tenants_with_one_name_of_a_session_are_two_sessions() -> None:
    world = World()
    ours, theirs = world.request("x", tenant="a", session="same"), world.request("x", tenant="b", session="same")
    world.turn(ours)
    world.turn(theirs)

    assert world.speculation.num_sessions == 2
    world.planner.lookup(world.request("x", tenant="a", session="same"), world.now)
    assert world.speculation.num_sessions == 1
    left = next(iter(world.speculation._idle.values()))
    assert left.request.keys == theirs.keys


def test_budgets_of_slots_and_bytes_hold() -> None:
    world = World(SpeculationSettings("on", max_slots=6, bytes_per_s=2.0 * PAGE_BYTES, max_waste=1.0))
    world.learn()
    for number in range(4):
        world.turn(world.request(f"s{number}"))
    world.push_out()
    world.wait(40.0)
    world.fetched.clear()

    world.wait(1.0)
    assert world.num_fetched <= 4  # what was saved up of a second, and one second
    world.wait(50.0)

    assert world.speculation.num_held <= 6


def test_nothing_is_sent_while_a_load_is_under_way() -> None:
    world = World()
    world.learn()
    world.turn(world.request("reader"))
    world.turn(world.request("other"))
    world.push_out()
    world.planner.prepare_load(world.request("other"), 4, world.now)
    world.planner.take_transfers()  # nobody answers

    for _ in range(90):
        world.now += 1.0
        world.planner.tick(world.now)

    assert not [t for t in world.planner.take_transfers() if t.priority is Priority.PREFETCH and t.op is Op.FETCH]


def test_pages_of_sessions_that_are_as_likely_to_return_do_not_make_room() -> None:
    world = World(num_slots=8)
    world.learn()
    world.turn(world.request("first"))
    world.wait(1.0)
    world.turn(world.request("second"))
    world.turn(world.request("third"))  # pushes out the first
    world.fetched.clear()

    world.wait(60.0)

    assert world.num_fetched == 0
    assert world.turn(world.request("third")) == {"host": 4}


def test_speculation_that_wastes_stops_itself_and_tries_again_after_a_pause() -> None:
    world = World(SpeculationSettings("auto", max_slots=32, bytes_per_s=1e9, max_waste=1.0))
    world.learn(turns=400)
    for number in range(24):  # none of them comes back
        world.turn(world.request(f"gone {number}"))
        world.push_out()
        world.wait(95.0)
        world.push_out()
        world.wait(200.0, 5.0)

    assert world.speculation.verdict.num_stopped >= 1
    assert world.speculation.counters["wasted"] < 24 * 4
    world.wait(7200.0, 100.0)
    assert world.speculation.verdict.may_bring(world.now)


def test_a_tier_that_goes_away_under_a_prefetch_costs_nothing_but_the_pages() -> None:
    world = World()
    world.learn()
    world.turn(world.request("reader"))
    world.push_out()
    world.fails = True

    world.wait(95.0)

    assert world.num_fetched > 0
    assert world.planner.books.host.num_filling == 0
    world.planner.check()
    world.fails = False
    world.turn(world.request("reader"))
    world.wait(10.0)


def test_after_an_interrupt_it_begins_anew_and_keeps_what_it_has_learned() -> None:
    world = World()
    world.learn()
    leaving = world.speculation.table.leaving("stop", 100.0)
    before = world.speculation.table.chance(leaving, 50.0, 50.0, 200.0)

    world.planner.mend(10**9, world.now)

    assert world.speculation.num_sessions == 0
    assert world.speculation.table.chance(leaving, 50.0, 50.0, 200.0) == before
    world.planner.check()


def test_what_is_remembered_is_bounded() -> None:
    world = World()
    request = world.request("many", 600)
    for number in range(MAX_HASHES // 600 + 10):
        request.options = RequestOptions(session=str(number))
        world.speculation.ended(request, world.now, Ending())
    for number in range(MAX_SESSIONS + 10):
        world.speculation.ended(world.request(f"s{number}", 1), world.now, Ending())

    assert world.speculation.num_sessions <= MAX_SESSIONS
    world.speculation.check()


def test_a_page_of_two_sessions_that_was_evicted_and_brought_again_is_held_for_one_of_them() -> None:
    world = World(SpeculationSettings("on", max_slots=16, bytes_per_s=1e9, max_waste=1.0))
    world.learn()
    world.turn(world.request("shared", session="first"))
    world.wait(10.0)
    world.turn(world.request("shared", session="second"))

    for _ in range(80):  # evicted each time, before the next look at the session it was brought for
        world.push_out()
        world.wait(1.0)

    assert world.speculation.counters["brought"] > 8
    counters = world.speculation.counters
    assert counters["brought"] == counters["used"] + counters["wasted"] + world.speculation.num_held


def test_against_a_dumb_model_books_and_budgets_hold_whatever_happens() -> None:
    for seed in range(6):
        rng = random.Random(seed)
        world = World(SpeculationSettings("on", max_slots=5, bytes_per_s=8.0 * PAGE_BYTES, max_waste=50.0), 16)
        stored: dict[str, int] = {}
        for _ in range(300):
            name = f"s{rng.randrange(6)}"
            what = rng.randrange(10)
            if what < 5:
                size = rng.randint(1, 5)
                hit = sum(world.turn(world.request(name, size), last_turn=what == 0).values())
                assert hit <= stored.get(name, 0)  # a dumb model: no more than was ever saved of it
                stored[name] = max(stored.get(name, 0), size)
            elif what < 8:
                world.wait(rng.choice([1.0, 10.0, 60.0]), 1.0)
            elif what == 8:
                world.fails = not world.fails
            else:
                world.planner.forget(world.request(name, 5), 0, world.now)
                stored.pop(name, None)
                world.carry()
            world.planner.check()


def test_of_a_long_prompt_a_bounded_head_is_remembered_and_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PATH", 6)
    world = World()
    world.learn()
    world.turn(world.request("reader", 20, session=""))
    (idle,) = [idle for idle in world.speculation._idle.values() if not idle.request.options.session]
    assert len(idle.request.keys) == 6
    touched: list[int] = []
    touch = world.planner.books.host.touch
    monkeypatch.setattr(world.planner.books.host, "touch", lambda path: (touched.append(len(path)), touch(path)))
    world.wait(20.0)
    world.push_out()

    world.wait(75.0)

    assert max(touched) <= 6, "nor is more of it walked when pages arrive"
    assert world.turn(world.request("reader", 22, session="")) == {"host": 6, "disk": 14}, "found again by its end"


def test_a_tick_looks_at_no_more_blocks_than_a_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_BLOCKS_SEEN", 8)
    world = World()
    world.learn()
    for name in range(6):
        world.turn(world.request(f"reader {name}"))
    world.push_out()
    surveyed: list[int] = []
    survey = world.planner.lookups.survey
    monkeypatch.setattr(
        world.planner.lookups, "survey", lambda request: surveyed.append(len(request.keys)) or survey(request)
    )

    for _ in range(200):
        surveyed.clear()
        world.now += 1.0
        world.planner.tick(world.now)
        assert sum(surveyed) <= 8, "twice four blocks"
        world.carry()

    assert world.speculation.counters["brought"] == 16, "the others come in later ticks, as many as have slots"


def test_it_says_when_a_tick_has_something_to_do() -> None:
    world = World()
    assert world.speculation.due_at(world.now) == float("inf")
    world.turn(world.request("reader"))
    due = world.speculation.due_at(world.now)
    assert world.now < due < world.now + 1.0
    world.now = due
    world.planner.tick(world.now)
    assert world.speculation.due_at(world.now) > due
