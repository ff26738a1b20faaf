"""One lane: what it carries, in which order, and that each transfer has exactly one outcome whatever the tier does."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from kvstore.direction import Direction
from kvstore.errors import ConfigError, TierFull, TierRefused, TierUnavailable
from kvstore.move.breaker import Breaker, BreakerState
from kvstore.move.counters import MAX_REASONS, LaneCounters
from kvstore.move.lane import MIN_EVIDENCE_S, Lane
from kvstore.page import PageKey, PageMeta
from kvstore.plan.records import Op, Outcome, Priority
from kvstore.testing.pages import FakeClock, fetch, key_of, payload, store
from kvstore.tiers.base import Tier
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.lanes import PAGE_BYTES, SLOT_BYTES, Recorder, Transfers
from tests.helpers.waiting import WAIT_S, wait_until

TIMEOUT_S = 2.0
META = PageMeta(PAGE_BYTES)

MakeLane = Callable[..., Lane]


@pytest.fixture
def make_lane(
    tier: FaultyTier, slot_view: Callable[[int], memoryview], recorder: Recorder, clock: FakeClock
) -> Iterator[MakeLane]:
    lanes: list[Lane] = []

    def make_lane(*, workers: int = 1, max_queue: int = 16, view: Callable[[int], memoryview] = slot_view) -> Lane:
        breaker = Breaker(3, 1.0, 8.0, clock)
        lane = Lane(tier, view, workers=workers, breaker=breaker, timeout_s=TIMEOUT_S, max_queue=max_queue)
        lane.start(recorder.outcome, recorder.event, clock)
        lanes.append(lane)
        return lane

    yield make_lane
    tier.recover()
    for lane in lanes:
        lane.stop()
        assert lane.join(WAIT_S) == []


@pytest.fixture
def lane(make_lane: MakeLane) -> Lane:
    return make_lane()


# What it carries.


def test_a_fetch_fills_the_slots_of_what_is_there(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, slab: list[memoryview]
) -> None:
    there, missing = key_of("there"), key_of("missing")
    store(tier.inner, [there], SLOT_BYTES, meta=META)

    lane.submit([make(Op.FETCH, [missing, there], first_slot=4)])

    (outcome,) = recorder.wait(1)
    assert outcome.ok == (False, True)
    assert outcome.num_bytes == PAGE_BYTES
    assert outcome.error is None
    assert bytes(slab[5][:PAGE_BYTES]) == payload(there, PAGE_BYTES)
    assert (lane.counters.fetched_pages, lane.counters.fetched_bytes) == (1, PAGE_BYTES)
    assert (lane.counters.failed_fetch_pages, lane.counters.errors) == (1, 0)


def test_a_spill_stores_the_slots_and_evicts_first(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, slab: list[memoryview]
) -> None:
    old, new = key_of("old"), key_of("new")
    store(tier.inner, [old], SLOT_BYTES, meta=META)
    slab[0][:PAGE_BYTES] = payload(new, PAGE_BYTES)
    spill = make(Op.SPILL, [new])

    lane.submit([replace(spill, evict=(old,))])

    (outcome,) = recorder.wait(1)
    assert outcome.ok == (True,)
    assert fetch(tier.inner, [old, new], SLOT_BYTES, meta=META) == [None, payload(new, PAGE_BYTES)]
    assert (lane.counters.spilled_pages, lane.counters.spilled_bytes) == (1, PAGE_BYTES)


def test_probe_touch_and_delete_answer_per_key(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    there, missing = key_of("there"), key_of("missing")
    store(tier.inner, [there], SLOT_BYTES, meta=META)
    transfers = [make(op, [there, missing]) for op in (Op.PROBE, Op.TOUCH, Op.DELETE, Op.PROBE)]

    lane.submit(transfers)

    recorder.wait(4)
    assert [recorder.of(t.id).ok for t in transfers] == [(True, False), (True, False), (True, True), (False, False)]
    assert [recorder.of(t.id).num_bytes for t in transfers] == [0] * 4


def test_loads_go_before_prefetches_and_prefetches_before_saves(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    tier.hang(honour_timeout=False)
    first = make(Op.PROBE)
    lane.submit([first])
    tier.wait_for_hanging()
    waiting = [make(Op.PROBE, priority=p) for p in (Priority.SAVE, Priority.PREFETCH, Priority.LOAD, Priority.LOAD)]
    lane.submit(waiting)
    assert lane.counters.queued == 4

    tier.recover()

    save, prefetch, load_1, load_2 = [t.id for t in waiting]
    assert [o.transfer_id for o in recorder.wait(5)] == [first.id, load_1, load_2, prefetch, save]
    assert lane.counters.queued == 0


def test_a_prefetch_that_a_request_waits_for_goes_with_the_loads(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    tier.hang(honour_timeout=False)
    first = make(Op.PROBE)
    lane.submit([first])
    tier.wait_for_hanging()
    early, wanted = (make(Op.PROBE, priority=Priority.PREFETCH) for _ in range(2))
    lane.submit([early, wanted])

    lane.promote([wanted.id, first.id, 999])
    tier.recover()

    assert [o.transfer_id for o in recorder.wait(3)] == [first.id, wanted.id, early.id]


# Saves and loads.


def test_saves_never_take_the_last_worker(
    make_lane: MakeLane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    lane = make_lane(workers=3)
    tier.hang(honour_timeout=False, only=("write_from",))
    saves = [make(Op.SPILL, [key_of(i)], first_slot=i) for i in range(5)]
    lane.submit(saves)
    tier.wait_for_hanging(2)

    load = make(Op.FETCH, [key_of("x")])
    lane.submit([load])

    assert [o.transfer_id for o in recorder.wait(1)] == [load.id]
    assert lane.counters.running == 2
    tier.recover()
    recorder.wait(6)
    assert {o.transfer_id for o in recorder.outcomes} == {load.id, *(s.id for s in saves)}


def test_one_worker_alone_saves_too(lane: Lane, make: Transfers, recorder: Recorder) -> None:
    lane.submit([make(Op.SPILL), make(Op.SPILL)])

    assert all(all(o.ok) for o in recorder.wait(2))


def test_a_save_held_back_goes_while_the_worker_before_it_still_delivers(
    tier: FaultyTier, make: Transfers, slot_view: Callable[[int], memoryview]
) -> None:
    first, second = make(Op.SPILL, [key_of(1)]), make(Op.SPILL, [key_of(2)])
    second_delivered = threading.Event()
    seen: list[bool] = []

    def deliver(outcome: Outcome) -> None:
        if outcome.transfer_id == first.id:
            seen.append(second_delivered.wait(WAIT_S))  # as a callback that waits for the store's lock
        else:
            second_delivered.set()

    lane = Lane(tier, slot_view, workers=2)
    lane.start(deliver, lambda event: None)
    lane.submit([first, second])

    assert second_delivered.wait(WAIT_S)
    lane.stop()
    assert lane.join(WAIT_S) == []
    assert seen == [True]


# Time.


@pytest.mark.parametrize(
    ("op", "left_s", "expected_s"),
    [
        (Op.FETCH, 0.5, 0.5),
        (Op.FETCH, 100.0, TIMEOUT_S),
        (Op.FETCH, float("inf"), TIMEOUT_S),
        (Op.PROBE, 0.25, 0.25),
        (Op.SPILL, 0.5, TIMEOUT_S),  # a write that has begun is worth finishing
    ],
)
def test_the_tier_is_given_the_time_that_is_left(
    lane: Lane,
    tier: FaultyTier,
    make: Transfers,
    recorder: Recorder,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    op: Op,
    left_s: float,
    expected_s: float,
) -> None:
    given: list[float] = []
    for method in ("contains", "read_into", "write_from"):

        def note(keys: list[PageKey], *args: object, timeout_s: float, **more: object) -> list[bool]:
            given.append(timeout_s)
            return [True] * len(keys)

        monkeypatch.setattr(tier, method, note)

    lane.submit([make(op, deadline=clock() + left_s)])

    recorder.wait(1)
    assert given == [pytest.approx(expected_s)]


def test_what_was_not_begun_by_its_deadline_never_reaches_the_tier(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    lane.submit([make(Op.FETCH, 2, deadline=clock())])

    (outcome,) = recorder.wait(1)
    assert outcome.ok == (False, False)
    assert outcome.error is not None
    assert "not begun by its deadline" in outcome.error
    assert not tier.calls
    assert (lane.counters.expired, lane.counters.transfers) == (1, 0)


def test_waiting_transfers_expire_while_every_worker_hangs(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    tier.hang(honour_timeout=False)
    lane.submit([make(Op.FETCH)])
    tier.wait_for_hanging()
    soon, later = make(Op.FETCH, deadline=clock() + 0.5), make(Op.FETCH, deadline=clock() + 9)
    lane.submit([soon, later])

    clock.advance(1.0)
    lane.check(clock())

    assert [o.transfer_id for o in recorder.outcomes] == [soon.id]
    assert (lane.counters.expired, lane.counters.queued) == (1, 1)


def test_cancelled_transfers_are_answered_and_those_inside_the_tier_run_on(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    tier.hang(honour_timeout=False)
    running, waiting = make(Op.PROBE), make(Op.PROBE)
    lane.submit([running])
    tier.wait_for_hanging()
    lane.submit([waiting])

    lane.cancel([running.id, waiting.id, 999])

    assert [(o.transfer_id, o.ok) for o in recorder.outcomes] == [(waiting.id, (False,))]
    assert lane.counters.cancelled == 1
    tier.recover()
    recorder.wait(2)
    assert recorder.of(running.id).error is None


def test_a_full_queue_refuses_at_once(lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder) -> None:
    tier.hang(honour_timeout=False)
    lane.submit([make(Op.PROBE)])
    tier.wait_for_hanging()

    lane.submit([make(Op.PROBE) for _ in range(17)])

    (outcome,) = recorder.wait(1)
    assert outcome.error is not None
    assert "too many transfers wait" in outcome.error
    assert lane.counters.refused == 1


# Failures.


def test_pages_that_are_not_there_never_open_the_breaker(lane: Lane, make: Transfers, recorder: Recorder) -> None:
    lane.submit([make(Op.FETCH, 3) for _ in range(10)])

    recorder.wait(10)
    assert lane.breaker.allow()


def test_a_tier_that_is_full_has_answered(lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder) -> None:
    tier.fail(error=TierFull("no room"))

    lane.submit([make(Op.SPILL) for _ in range(5)])

    outcomes = recorder.wait(5)
    assert all(o.error is not None and "TierFull: no room" in o.error for o in outcomes)
    assert lane.breaker.allow()
    assert lane.counters.errors == 5


@pytest.mark.parametrize("error", [TierUnavailable("gone\naway"), OSError(5, "EIO"), TypeError("a bug"), SystemExit(1)])
def test_three_failures_take_the_tier_out_and_nothing_waits_for_it(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, error: BaseException
) -> None:
    tier.fail(error=error)
    tier.hang(honour_timeout=False)
    transfers = [make(Op.FETCH, 2) for _ in range(6)]

    lane.submit(transfers)

    outcomes = recorder.wait(6, num_states=1)
    assert {o.transfer_id for o in outcomes} == {t.id for t in transfers}
    assert all(o.ok == (False, False) and o.error and "\n" not in o.error for o in outcomes)
    assert recorder.states == [(tier.name, False)]
    assert tier.calls["read_into"] == 3
    assert (lane.counters.errors, lane.counters.refused) == (3, 3)
    lane.submit([make(Op.FETCH)])
    assert "the breaker is open" in str(recorder.wait(7)[-1].error)


def test_an_answer_of_the_wrong_length_is_an_error(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier, "contains", lambda keys, timeout_s: [True])

    lane.submit([make(Op.PROBE, 2)])

    (outcome,) = recorder.wait(1)
    assert outcome.ok == (False, False)
    assert outcome.error is not None
    assert "1 answers for 2 keys" in outcome.error


def test_a_timeout_that_was_too_short_to_prove_anything_does_not_count(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_out(keys: list[PageKey], *, timeout_s: float) -> list[bool]:
        clock.advance(timeout_s)
        raise TierUnavailable("no answer in time")

    monkeypatch.setattr(tier, "contains", time_out)

    for number in range(6):
        lane.submit([make(Op.PROBE, deadline=clock() + MIN_EVIDENCE_S / 2)])
        recorder.wait(number + 1)
    assert lane.breaker.allow()

    for number in range(6, 9):
        lane.submit([make(Op.PROBE, deadline=clock() + MIN_EVIDENCE_S * 2)])
        recorder.wait(number + 1)
    assert not lane.breaker.allow()


def test_a_failed_call_keeps_no_view_of_its_slots(
    make_lane: MakeLane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    arena = mmap.mmap(-1, SLOT_BYTES)
    lane = make_lane(view=lambda slot: memoryview(arena))
    tier.fail(times=2, error=TierUnavailable("gone"))
    lane.submit([make(Op.FETCH)])
    recorder.wait(1)
    lane.submit([make(Op.FETCH)])
    recorder.wait(2)

    lane.stop()
    assert lane.join(WAIT_S) == []

    arena.close()  # raises BufferError while a view of it exists


# Refusals.


class ReadOnlyTier(FaultyTier):
    """Takes no pages; `probe` says whether it would."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.probed: list[Direction] = []

    def probe(self, way: Direction, *, timeout_s: float) -> None:
        self.probed.append(way)
        if way is Direction.WRITE:
            self.write_from([], [], [], timeout_s=timeout_s)


def test_refused_writes_leave_reads_alone_and_come_back_by_a_test_of_writes(
    slot_view: Callable[[int], memoryview], recorder: Recorder, clock: FakeClock
) -> None:
    tier = ReadOnlyTier(MemoryTier(8, SLOT_BYTES))
    lane = Lane(tier, slot_view, workers=1, breaker=Breaker(3, 1.0, 8.0, clock), timeout_s=TIMEOUT_S)
    lane.start(recorder.outcome, recorder.event, clock)
    make = Transfers(tier.name)
    tier.fail(error=TierRefused("READONLY You can't write", "READONLY"), only=("write_from",))

    lane.submit([make(Op.SPILL) for _ in range(5)])
    recorder.wait(5, num_states=1)
    lane.submit([make(Op.PROBE), make(Op.FETCH), make(Op.DELETE)])
    answered = recorder.wait(8)[5:]

    assert all(one.error is None for one in answered)
    assert recorder.directions == [frozenset({Direction.WRITE})]
    assert "READONLY You can't write" in recorder.reasons[0]
    assert lane.counters.refusals == {"write": {"READONLY": 3}}
    lane.submit([make(Op.SPILL)])
    assert "write: the breaker is open" in str(recorder.wait(9)[-1].error)

    clock.advance(1.0)
    lane.check(clock())
    wait_until(lambda: lane.directions.breakers[Direction.WRITE].state is BreakerState.OPEN)
    assert tier.probed == [Direction.WRITE]
    assert tier.calls["ping"] == 0
    tier.recover()
    clock.advance(2.0)
    lane.check(clock())
    recorder.wait(9, num_states=2)
    lane.submit([make(Op.SPILL)])

    assert recorder.wait(10)[-1].ok == (True,)
    assert lane.directions.reasons == {}
    lane.stop()
    assert lane.join(WAIT_S) == []


def test_reasons_of_refusals_are_bounded_as_labels() -> None:
    counters = LaneCounters()

    for number in range(10 * MAX_REASONS):
        counters.add_refusal(Direction.READ, f"E{number}")

    assert len(counters.refusals["read"]) == MAX_REASONS + 1
    assert sum(counters.refusals["read"].values()) == 10 * MAX_REASONS


# Hung workers and pings.


def test_a_worker_stuck_in_its_tier_opens_the_breaker_and_answers_when_it_comes_back(
    make_lane: MakeLane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    lane = make_lane(workers=2)
    tier.hang(honour_timeout=False, only=("read_into",))
    stuck = make(Op.FETCH, deadline=clock() + 0.5)
    lane.submit([stuck])
    tier.wait_for_hanging()

    clock.advance(1.4)
    lane.check(clock())
    assert lane.breaker.allow()

    clock.advance(0.2)
    lane.check(clock())
    lane.check(clock())

    assert recorder.states == [(tier.name, False)]
    assert "inside it for 1.6 s" in recorder.reasons[0]
    assert lane.counters.stuck == 1
    assert recorder.outcomes == []  # the tier may still write into its slot
    tier.recover()
    recorder.wait(1)
    assert recorder.of(stuck.id).error is None
    assert (lane.counters.stuck, lane.counters.running) == (0, 0)
    assert lane.breaker.state is BreakerState.OPEN


def test_a_tier_that_answers_its_ping_is_up_again(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    tier.fail()
    lane.submit([make(Op.PROBE) for _ in range(3)])
    recorder.wait(3, num_states=1)

    lane.check(clock())
    assert tier.calls["ping"] == 0
    clock.advance(1.0)
    lane.check(clock())
    wait_until(lambda: lane.breaker.state is BreakerState.OPEN)
    assert tier.calls["ping"] == 1

    tier.recover()
    clock.advance(2.0)
    lane.check(clock())

    recorder.wait(3, num_states=2)
    assert recorder.states == [(tier.name, False), (tier.name, True)]
    lane.submit([make(Op.PROBE)])
    assert recorder.wait(4)[-1].error is None


def test_a_ping_that_hangs_is_asked_once_and_holds_nobody_up(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    tier.fail(times=3)
    lane.submit([make(Op.PROBE) for _ in range(3)])
    recorder.wait(3, num_states=1)
    tier.hang(honour_timeout=False, only=("ping",))
    clock.advance(1.0)

    lane.check(clock())
    tier.wait_for_hanging()
    for _ in range(3):
        clock.advance(100.0)
        lane.check(clock())
    lane.submit([make(Op.PROBE)])

    assert "the breaker is open" in str(recorder.wait(4)[-1].error)
    assert tier.calls["ping"] == 1


def test_nobody_pings_for_a_lane_whose_workers_are_all_stuck(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder, clock: FakeClock
) -> None:
    tier.hang(honour_timeout=False, only=("read_into",))
    lane.submit([make(Op.FETCH)])
    tier.wait_for_hanging()
    clock.advance(100.0)
    lane.check(clock())
    clock.advance(100.0)
    lane.check(clock())
    assert tier.calls["ping"] == 0

    tier.recover()
    recorder.wait(1)
    lane.check(clock())

    recorder.wait(1, num_states=2)
    assert lane.breaker.allow()


# The end.


def test_stop_drops_what_waits_and_lets_the_running_finish(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    tier.hang(honour_timeout=False)
    running, waiting, late = make(Op.PROBE), make(Op.PROBE), make(Op.PROBE)
    lane.submit([running])
    tier.wait_for_hanging()
    lane.submit([waiting])

    assert lane.stop() == 1
    lane.submit([late])
    tier.recover()

    assert lane.join(WAIT_S) == []
    assert lane.abandon() == 0
    assert "the lane is closed" in str(recorder.of(waiting.id).error)
    assert "the lane is closed" in str(recorder.of(late.id).error)
    assert recorder.of(running.id).error is None
    assert lane.counters.dropped == 2


def test_an_abandoned_transfer_is_answered_once_though_the_tier_comes_back(
    lane: Lane, tier: FaultyTier, make: Transfers, recorder: Recorder
) -> None:
    tier.hang(honour_timeout=False)
    lane.submit([make(Op.PROBE)])
    tier.wait_for_hanging()
    lane.stop()
    assert lane.join(0.0) == [f"kvstore-{tier.name}-0"]

    assert lane.abandon() == 1
    tier.recover()

    assert lane.join(WAIT_S) == []
    assert len(recorder.outcomes) == 1
    assert "still inside the tier" in str(recorder.outcomes[0].error)


@pytest.mark.parametrize(
    ("field", "value"), [("workers", 0), ("max_queue", 0), ("timeout_s", 0.0), ("timeout_s", -1.0)]
)
def test_impossible_numbers_are_refused(
    tier: FaultyTier, slot_view: Callable[[int], memoryview], field: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Lane(tier, slot_view, **{field: value})  # type: ignore[arg-type]
