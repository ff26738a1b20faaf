"""All lanes together: exactly one outcome per transfer, callbacks without locks, tiers that come back, and the end."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from kvstore.direction import Direction
from kvstore.errors import ConfigError, StoreClosed
from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.move.mover import Mover
from kvstore.plan.records import Op, Outcome, Priority
from kvstore.testing.pages import FakeClock, key_of
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import Chances, FaultyTier
from tests.helpers.lanes import NUM_SLOTS, SLOT_BYTES, Recorder, Transfers
from tests.helpers.waiting import WAIT_S, wait_until

TICK_S = 0.002

MakeMover = Callable[..., Mover]


@pytest.fixture
def make_mover(
    tier: FaultyTier, slot_view: Callable[[int], memoryview], recorder: Recorder, clock: FakeClock
) -> Iterator[MakeMover]:
    movers: list[Mover] = []

    def make_mover(
        *tiers: FaultyTier,
        workers: int = 2,
        on_outcome: Callable[[Outcome], None] = recorder.outcome,
        on_tick: Callable[[], None] = lambda: None,
        now: Callable[[], float] = clock,
    ) -> Mover:
        lanes = [
            Lane(t, slot_view, workers=workers, breaker=Breaker(3, 0.01, 0.02, now), timeout_s=0.5, max_queue=4096)
            for t in (tiers or (tier,))
        ]
        mover = Mover(lanes, on_outcome, recorder.state, on_tick, now=now, tick_s=TICK_S)
        movers.append(mover)
        return mover

    yield make_mover
    tier.recover()
    for mover in movers:
        mover.close(WAIT_S)


def test_outcomes_come_from_the_thread_that_carried_the_transfer(
    make_mover: MakeMover, make: Transfers, recorder: Recorder
) -> None:
    make_mover(workers=1).submit([make(Op.SPILL, priority=Priority.LOAD), make(Op.FETCH)])

    assert all(all(outcome.ok) for outcome in recorder.wait(2))
    assert recorder.threads == ["kvstore-memory-0"] * 2


def test_each_transfer_goes_to_the_lane_of_its_tier(
    make_mover: MakeMover, slot_view: Callable[[int], memoryview], recorder: Recorder
) -> None:
    disk, redis = (FaultyTier(MemoryTier(8, SLOT_BYTES, name=name)) for name in ("disk", "redis"))
    make = Transfers("disk")

    make_mover(disk, redis).submit([make(Op.PROBE), make(Op.PROBE, tier="redis"), make(Op.PROBE, tier="redis")])

    recorder.wait(3)
    assert (disk.calls["contains"], redis.calls["contains"]) == (1, 2)


def test_a_transfer_to_a_tier_nobody_has_is_answered(
    make_mover: MakeMover, make: Transfers, recorder: Recorder
) -> None:
    make_mover().submit([make(Op.PROBE, 2, tier="tape")])

    (outcome,) = recorder.wait(1)
    assert outcome.ok == (False, False)
    assert "tape" in str(outcome.error)


def test_two_lanes_of_one_name_are_refused(tier: FaultyTier, slot_view: Callable[[int], memoryview]) -> None:
    lanes = [Lane(tier, slot_view), Lane(tier, slot_view)]

    with pytest.raises(ConfigError, match="two lanes"):
        Mover(lanes, lambda outcome: None, lambda state: None, lambda: None)


# Callbacks.


def test_submit_and_cancel_never_call_back_so_the_caller_may_hold_the_lock_of_its_callbacks(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    lock = threading.Lock()

    def on_outcome(outcome: Outcome) -> None:
        with lock:
            recorder.outcome(outcome)

    mover = make_mover(on_outcome=on_outcome)
    tier.hang(honour_timeout=False)
    with lock:
        mover.submit([make(Op.PROBE), make(Op.PROBE)])
        tier.wait_for_hanging(2)
        waiting, lost = make(Op.PROBE), make(Op.PROBE, tier="tape")
        mover.submit([waiting, lost])
        mover.cancel([waiting.id])
        assert recorder.outcomes == []

    recorder.wait(2)
    assert {outcome.transfer_id for outcome in recorder.outcomes} == {waiting.id, lost.id}


def test_a_callback_may_submit_the_next_transfer(make_mover: MakeMover, make: Transfers, recorder: Recorder) -> None:
    chain = [make(Op.PROBE) for _ in range(20)]

    def on_outcome(outcome: Outcome) -> None:
        index = len(recorder.outcomes) + 1
        recorder.outcome(outcome)
        if index < len(chain):
            mover.submit([chain[index]])

    mover = make_mover(on_outcome=on_outcome)
    mover.submit(chain[:1])

    assert [outcome.transfer_id for outcome in recorder.wait(20)] == [t.id for t in chain]


def test_a_callback_that_fails_is_logged_and_the_others_are_called(
    make_mover: MakeMover, make: Transfers, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    bad = make(Op.PROBE)

    def on_outcome(outcome: Outcome) -> None:
        recorder.outcome(outcome)
        if outcome.transfer_id == bad.id:
            raise RuntimeError("a bug in the planner")

    mover = make_mover(workers=1, on_outcome=on_outcome)
    mover.submit([bad, make(Op.PROBE)])

    recorder.wait(2)
    assert mover.num_callback_errors == 1
    assert "a bug in the planner" in caplog.text


def test_the_housekeeper_ticks_while_every_worker_hangs(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers
) -> None:
    ticks = threading.Semaphore(0)
    tier.hang(honour_timeout=False)
    mover = make_mover(on_tick=ticks.release)
    mover.submit([make(Op.PROBE) for _ in range(3)])
    tier.wait_for_hanging(2)

    assert all(ticks.acquire(timeout=WAIT_S) for _ in range(3))


def test_deadlines_are_kept_while_every_worker_hangs(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    tier.hang(honour_timeout=False)
    mover = make_mover()
    mover.submit([make(Op.PROBE), make(Op.PROBE)])
    tier.wait_for_hanging(2)
    waiting = make(Op.FETCH, deadline=clock() + 0.1)
    mover.submit([waiting])

    clock.advance(0.1)

    (outcome,) = recorder.wait(1)
    assert outcome.transfer_id == waiting.id
    assert recorder.threads == ["kvstore-housekeeper"]


# Tiers that go and come back.


def test_a_dead_tier_is_reported_down_and_up_again_by_itself(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    mover = make_mover()
    tier.fail()
    mover.submit([make(Op.PROBE) for _ in range(5)])
    recorder.wait(5, num_states=1)

    tier.recover()
    clock.advance(0.02)

    recorder.wait(5, num_states=2)
    assert recorder.states == [(tier.name, False), (tier.name, True)]
    mover.submit([make(Op.PROBE)])
    assert recorder.wait(6)[-1].error is None


def test_a_frozen_tier_costs_other_tiers_nothing(make_mover: MakeMover, recorder: Recorder, clock: FakeClock) -> None:
    frozen, healthy = (FaultyTier(MemoryTier(8, SLOT_BYTES, name=name)) for name in ("frozen", "healthy"))
    frozen.hang(honour_timeout=False)
    mover = make_mover(frozen, healthy)
    make = Transfers("frozen")
    stuck = [make(Op.PROBE), make(Op.PROBE)]
    mover.submit(stuck)
    frozen.wait_for_hanging(2)
    clock.advance(10.0)
    recorder.wait(0, num_states=1)

    others = [make(Op.PROBE, tier="healthy") for _ in range(50)]
    mover.submit(others)

    recorder.wait(50)
    assert {o.transfer_id for o in recorder.outcomes} == {t.id for t in others}
    assert recorder.states == [("frozen", False)]
    frozen.recover()
    recorder.wait(52)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_tier_does_each_transfer_has_exactly_one_outcome(
    make_mover: MakeMover, recorder: Recorder, slot_view: Callable[[int], memoryview], seed: int
) -> None:
    """Losses, rubbish, errors, delays, deadlines, cancels and breakers that open and close, all at once."""
    rng = random.Random(seed)
    chances = Chances(unavailable=0.2, unexpected=0.05, slow=0.2, slow_s=0.001, lose=0.1, corrupt=0.1)
    tiers = [FaultyTier(MemoryTier(16, SLOT_BYTES, name=f"tier{i}"), chances=chances, seed=seed + i) for i in range(2)]
    clock = FakeClock(0.0)
    mover = make_mover(*tiers, workers=3, on_tick=lambda: clock.advance(TICK_S), now=clock)
    make = Transfers("tier0")
    transfers = [
        make(
            rng.choice(list(Op)),
            [key_of(rng.randrange(40)) for _ in range(rng.randint(1, 4))],
            priority=rng.choice(list(Priority)),
            deadline=clock() + rng.choice([0.0, 0.01, 0.1, float("inf")]),
            first_slot=rng.randrange(NUM_SLOTS - 4),
            tier=rng.choice(["tier0", "tier1"]),
        )
        for _ in range(600)
    ]
    for start in range(0, len(transfers), 20):
        batch = transfers[start : start + 20]
        mover.submit(batch)
        mover.cancel([t.id for t in rng.sample(batch, 2)])
        mover.promote([t.id for t in rng.sample(batch, 5)])
        if rng.random() < 0.3:
            recorder.wait(rng.randrange(start // 2 + 1))

    num_dropped = mover.close(WAIT_S)

    outcomes = Counter(outcome.transfer_id for outcome in recorder.outcomes)
    assert outcomes == Counter(t.id for t in transfers)
    sizes = {t.id: len(t.keys) for t in transfers}
    assert all(len(outcome.ok) == sizes[outcome.transfer_id] for outcome in recorder.outcomes)
    counters = [lane.counters for lane in mover.lanes.values()]
    never_begun = sum(c.expired + c.cancelled + c.refused + c.dropped for c in counters)
    assert sum(c.transfers for c in counters) + never_begun == len(transfers)
    assert num_dropped == sum(c.dropped for c in counters)
    assert all((c.queued, c.running, c.stuck) == (0, 0, 0) for c in counters)
    up: dict[tuple[str, Direction], bool] = {}
    for state in recorder.changes:
        assert state.directions
        for way in state.directions:
            assert up.get((state.tier, way), True) is not state.is_up, "each report is a change"
            up[state.tier, way] = state.is_up


# The end.


def test_close_answers_for_what_it_drops_and_says_how_many(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    def on_outcome(outcome: Outcome) -> None:
        recorder.outcome(outcome)
        tier.recover()  # once the first dropped one is answered, what is inside may go on

    mover = make_mover(workers=1, on_outcome=on_outcome)
    tier.hang(honour_timeout=False)
    mover.submit([make(Op.PROBE) for _ in range(4)])
    tier.wait_for_hanging()

    assert mover.close(WAIT_S) == 3

    assert len(recorder.outcomes) == 4
    assert sum(outcome.error is None for outcome in recorder.outcomes) == 1


def test_close_leaves_a_hung_worker_behind_and_says_so(
    make_mover: MakeMover,
    tier: FaultyTier,
    make: Transfers,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    mover = make_mover(workers=1)
    tier.hang(honour_timeout=False)
    mover.submit([make(Op.PROBE), make(Op.PROBE)])
    tier.wait_for_hanging()

    assert mover.close(0.02) == 2

    assert mover.num_hung == 1
    assert "still run: kvstore-memory-0" in caplog.text
    assert "dropped 1 waiting transfers and 1 that hung" in caplog.text
    assert len(recorder.outcomes) == 2
    tier.recover()
    wait_until(lambda: "kvstore-memory-0" not in [t.name for t in threading.enumerate()])
    assert len(recorder.outcomes) == 2


def test_a_callback_that_submits_while_the_mover_closes_is_answered_too(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    retries = [make(Op.PROBE) for _ in range(3)]
    submitted = list(retries)

    def on_outcome(outcome: Outcome) -> None:
        recorder.outcome(outcome)
        if outcome.error is not None and retries:
            mover.submit([retries.pop()])

    mover = make_mover(workers=1, on_outcome=on_outcome)
    tier.hang(honour_timeout=False)
    submitted += [make(Op.PROBE), make(Op.PROBE)]
    mover.submit(submitted[3:])
    tier.wait_for_hanging()

    mover.close(0.02)

    assert Counter(o.transfer_id for o in recorder.outcomes) == Counter(t.id for t in submitted)
    assert mover.num_callback_errors == 0


def test_after_close_nothing_can_be_submitted_and_closing_again_does_nothing(
    make_mover: MakeMover, make: Transfers
) -> None:
    mover = make_mover()
    assert mover.close(WAIT_S) == 0

    with pytest.raises(StoreClosed):
        mover.submit([make(Op.PROBE)])
    mover.cancel([1])
    assert mover.close(WAIT_S) == 0


def test_close_while_a_ping_hangs_returns_in_time(
    make_mover: MakeMover, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    mover = make_mover()
    tier.fail(times=3)
    tier.hang(honour_timeout=False, only=("ping",))
    mover.submit([make(Op.PROBE) for _ in range(3)])
    recorder.wait(3, num_states=1)
    clock.advance(1.0)
    tier.wait_for_hanging()

    assert mover.close(0.02) == 0


def test_a_housekeeper_that_is_busy_when_the_mover_closes_ends_afterwards(
    make_mover: MakeMover, make: Transfers
) -> None:
    is_busy, may_go_on = threading.Event(), threading.Event()

    def on_outcome(_: Outcome) -> None:
        is_busy.set()
        may_go_on.wait(WAIT_S)

    mover = make_mover(on_outcome=on_outcome)
    mover.submit([make(Op.PROBE, tier="tape")])  # a tier that there is not: the housekeeper answers
    assert is_busy.wait(WAIT_S)

    mover.close(0.0)
    may_go_on.set()

    wait_until(lambda: "kvstore-housekeeper" not in [t.name for t in threading.enumerate()])
