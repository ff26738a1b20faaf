"""One tier's queue and its worker threads.

A lane carries the planner's transfers to and from one tier: what a request waits for first, then prefetches, then
saves, and first come first served within each. It decides nothing. Its promise is *exactly one Outcome per Transfer*,
whatever the tier does: answer, fail, raise, or never come back.

Who delivers an outcome:

    carried by a worker                    that worker, from its own thread, with no lock held
    refused, cancelled, expired, dropped   the mover's housekeeper, through `emit`: the caller may hold the store's lock

What fails is judged by direction (`directions`): refused writes leave reads alone.

A transfer that is *inside* the tier is not given up while the lane lives: the tier may still write into its slots, so
telling the planner that they are free would let two pages share one place. A worker that stays there too long opens the
breaker instead, and the transfer's outcome comes when the tier returns.

The lock of this lane's condition guards the backlog, the breaker and the counters. It is held for dictionary operations
only, never while bytes move or a callback runs. Order of locks: store, mover, lane.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.direction import ALL_DIRECTIONS, Direction
from kvstore.errors import ConfigError, TierError, TierRefused, TierUnavailable
from kvstore.forks import forbid
from kvstore.move.backlog import Backlog
from kvstore.move.breaker import Breaker
from kvstore.move.calls import call_tier, in_words, longest_s, moved_bytes, one_line
from kvstore.move.counters import LaneCounters
from kvstore.move.directions import DIRECTION_OF, OPS_OF, Directions
from kvstore.move.threads import start_all
from kvstore.move.trials import Trials
from kvstore.plan.records import Op, Outcome, Priority, Transfer
from kvstore.tiers.base import Tier

log = logging.getLogger(__name__)

# A timeout shorter than this proves nothing: the last transfers of a burst begin just before their deadline, and three
# of them must not take out a tier that is busy and well. A guess; a healthy tier answers a small batch within it.
MIN_EVIDENCE_S = 0.02
STUCK_GRACE_S = 1.0  # a disk cannot be interrupted: a batch may overrun its time by this much or by once its length


class TierState(NamedTuple):
    """A tier, or some directions of it, went down or came back, and why.

    directions: those that changed. is_whole: it is the tier that did, and not a direction by itself.
    """

    tier: str
    is_up: bool
    reason: str
    directions: frozenset[Direction] = ALL_DIRECTIONS
    is_whole: bool = True


Event = Outcome | TierState


class _End(Enum):
    """How a call of the tier ended."""

    ANSWERED = "answered"
    REFUSED = "refused"  # an answer, but not one that this direction lives by
    UNANSWERED = "unanswered"


@dataclass(slots=True)
class _Running:
    """A transfer inside the tier."""

    transfer: Transfer
    began: float
    timeout_s: float
    is_stuck: bool = False


class Lane:
    """Carries transfers to one tier with `workers` threads. Any thread, after `start`.

    slot_view:  the bytes of a host slot, by number.
    workers:    threads; with more than one, one is always kept free of saves, so that a load never waits for a write.
    breaker:    of the tier as a whole, made for this lane alone, with the mover's clock; the directions get siblings of
                it. Metrics may read their states.
    timeout_s:  the longest any call to the tier may take.
    max_queue:  transfers of one priority that may wait; more are refused.
    """

    def __init__(
        self,
        tier: Tier,
        slot_view: Callable[[int], memoryview],
        *,
        workers: int = 2,
        breaker: Breaker | None = None,
        timeout_s: float = 5.0,
        max_queue: int = 1024,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"lane {tier.name}: workers is {workers}; it must be at least 1")
        if max_queue < 1:
            raise ConfigError(f"lane {tier.name}: max_queue is {max_queue}; it must be at least 1")
        if timeout_s <= 0:
            raise ConfigError(f"lane {tier.name}: timeout_s is {timeout_s}; it must be positive")
        self.tier = tier
        self.name = tier.name
        self.breaker = breaker if breaker is not None else Breaker()
        self.directions = Directions(self.breaker)
        self.counters = LaneCounters()
        self._slot_view = slot_view
        self._num_workers = workers
        self._max_saves = max(1, workers - 1)
        self._timeout_s = timeout_s
        self._wake = threading.Condition(threading.Lock())
        self._backlog = Backlog(max_queue)
        self._incoming: deque[Transfer] = deque()
        self._last_id = -1  # the highest number of those taken in
        self._running: dict[int, _Running] = {}  # by worker
        self._num_saves = 0  # SAVE transfers inside the tier
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._told = ALL_DIRECTIONS  # the directions that are open, as last reported
        self._trials = Trials(tier, self.breaker, self.directions, timeout_s, self._wake, self._report)
        self._deliver: Callable[[Outcome], None]
        self._emit: Callable[[Event], None]
        self._now: Callable[[], float]
        forbid(self)

    def start(
        self,
        deliver: Callable[[Outcome], None],
        emit: Callable[[Event], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the workers.

        deliver: called by a worker with what became of its transfer, no lock held; must not raise.
        emit:    takes what somebody else must deliver; called with locks held, so it only queues.
        """
        self._deliver, self._emit, self._now = deliver, emit, now
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"kvstore-{self.name}-{i}", daemon=True)
            for i in range(self._num_workers)
        ]
        start_all(self._threads, self.stop)

    def submit(self, transfers: Sequence[Transfer], *, again: bool = False) -> None:
        """Queue transfers, in the order of their numbers. What cannot be queued is answered at once, through `emit`.

        again: whoever was interrupted in here submits what may not have come; what has is left out. Numbers grow then.
        """
        with self._wake:
            if again:
                self._take_in()
                transfers = [transfer for transfer in transfers if transfer.id > self._last_id]
            self._incoming.extend(transfers)
            self._take_in()
            self._wake.notify(self._num_workers if again else min(len(transfers), self._num_workers))

    def _take_in(self) -> None:
        """Put what has come where it waits. Under the lock; interrupted anywhere, the next call goes on with it."""
        incoming = self._incoming
        while incoming:
            transfer = incoming[0]
            if self._closing:
                self.counters.dropped += 1
                self._refuse(transfer, "the lane is closed")
            elif not self.directions.allows(transfer.op):
                self.counters.refused += 1
                self._refuse(transfer, self._why_not(transfer.op))
            elif not self._backlog.push(transfer):
                self.counters.refused += 1
                self._refuse(transfer, "too many transfers wait already")
            self._last_id = max(self._last_id, transfer.id)
            incoming.popleft()
        self.counters.queued = len(self._backlog)

    def cancel(self, transfer_ids: Iterable[int]) -> None:
        """Drop those that still wait; those inside the tier run on, and unknown ids are ignored."""
        with self._wake:
            self._take_in()
            for transfer_id in transfer_ids:
                transfer = self._backlog.remove(transfer_id)
                if transfer is not None:
                    self.counters.cancelled += 1
                    self._refuse(transfer, "cancelled")
            self.counters.queued = len(self._backlog)

    def promote(self, transfer_ids: Iterable[int]) -> None:
        """Move prefetches that still wait to the loads: a request waits for them now."""
        with self._wake:
            self._take_in()
            for transfer_id in transfer_ids:
                self._backlog.promote(transfer_id)

    def check(self, now: float) -> None:
        """The housekeeper's round: expire transfers that wait in vain, find stuck workers, test what is due.

        It works when every worker hangs.
        """
        with self._wake:
            self._take_in()
            for transfer in self._backlog.remove_expired(now):
                self._expire(transfer)
            self.counters.queued = len(self._backlog)
            for running in self._running.values():
                grace_s = max(STUCK_GRACE_S, running.timeout_s)
                if not running.is_stuck and now > running.began + running.timeout_s + grace_s:
                    running.is_stuck = True
                    self.counters.stuck += 1
                    self._trip(f"a {running.transfer.op.value} has been inside it for {now - running.began:.1f} s")
            # While every worker is stuck there is nobody to do the work, whatever the ping would say.
            if self.counters.stuck < self._num_workers and not self._closing:
                self.counters.pings += self._trials.start_due(now)

    def stop(self) -> int:
        """Take nothing more, drop what waits, end after what is carried; return how many were dropped."""
        with self._wake:
            self._closing = True
            num_dropped = self._drop_waiting("the lane is closed")
            self.counters.dropped += num_dropped
            self._wake.notify_all()
        return num_dropped

    def join(self, timeout_s: float) -> list[str]:
        """Wait for the threads after `stop`; return the names of those that still run."""
        until = time.monotonic() + timeout_s
        threads = [*self._threads, *self._trials.threads]
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, until - time.monotonic()))
        return [thread.name for thread in others if thread.is_alive()]

    def abandon(self) -> int:
        """Answer for the transfers that are still inside the tier, after a `join` in vain; return how many.

        Their slots stay in the tier's hands until it returns, and must not be given to anyone.
        """
        with self._wake:
            abandoned = list(self._running.values())
            self._running.clear()
            self.counters.dropped += len(abandoned)
            self.counters.running = self.counters.stuck = 0
            for running in abandoned:
                self._refuse(running.transfer, "still inside the tier when the lane was closed")
        return len(abandoned)

    # -- workers -------------------------------------------------------------------------------------------------------

    def _work(self, worker: int) -> None:
        while (running := self._take(worker)) is not None:
            outcome = self._carry(worker, running)
            if outcome is not None:
                self._deliver(outcome)

    def _take(self, worker: int) -> _Running | None:
        """Wait for the next transfer and note that `worker` carries it; None when the lane closes."""
        with self._wake:
            while not self._closing:
                self._take_in()
                transfer = self._backlog.pop(without=(Priority.SAVE,) if self._num_saves >= self._max_saves else ())
                if transfer is None:
                    self._wake.wait()
                    continue
                self.counters.queued -= 1
                now = self._now()
                if transfer.deadline <= now:
                    self._expire(transfer)
                    continue
                # A late read is of no use, so it gets the time that is left; a write is worth finishing once begun.
                left_s = self._timeout_s if transfer.op is Op.SPILL else transfer.deadline - now
                running = _Running(transfer, now, min(longest_s(transfer, self._timeout_s), left_s))
                self._running[worker] = running
                self._num_saves += transfer.priority is Priority.SAVE
                self.counters.transfers += 1
                self.counters.running += 1
                return running
            return None

    def _carry(self, worker: int, running: _Running) -> Outcome | None:
        """Call the tier and book what came of it; None if the transfer has been answered for by `abandon`."""
        transfer = running.transfer
        ok = (False,) * len(transfer.keys)
        error_line, end, reason = None, _End.ANSWERED, ""
        # Broad, because this is the lane's top and nothing above could answer for the transfer. The exception is not
        # kept: its traceback holds the slot views.
        try:
            ok = call_tier(self.tier, transfer, self._slot_view, running.timeout_s)
        except TierRefused as error:
            error_line, end, reason = self._line(transfer, error), _End.REFUSED, error.reason
        except TierUnavailable as error:
            error_line, end = self._line(transfer, error), _End.UNANSWERED
        except TierError as error:
            error_line = self._line(transfer, error)  # a full tier and a corrupt page are answers
        except BaseException as error:
            error_line, end, reason = self._line(transfer, error), _End.REFUSED, type(error).__name__
            log.exception("tier %s: unexpected error in %s", self.name, transfer.op.value)
        num_bytes = moved_bytes(transfer, ok)
        with self._wake:
            self._num_saves -= transfer.priority is Priority.SAVE
            self._wake.notify()  # a save that was held back may go now, and this worker has an outcome to deliver first
            if self._running.pop(worker, None) is None:
                return None
            seconds = max(0.0, self._now() - running.began)
            self.counters.running -= 1
            self.counters.stuck -= running.is_stuck
            self.counters.errors += error_line is not None
            self.counters.add(transfer, ok, seconds, num_bytes)
            if end is _End.REFUSED:
                self.counters.add_refusal(DIRECTION_OF[transfer.op], reason)
            self._judge(running, seconds, end, error_line)
        return Outcome(transfer.id, ok, seconds, num_bytes, error_line)

    # -- the breakers, under the lock ----------------------------------------------------------------------------------

    def _judge(self, running: _Running, seconds: float, end: _End, error_line: str | None) -> None:
        """Tell the breakers how a transfer went."""
        op, line = running.transfer.op, error_line or "it failed"
        had_no_time = running.timeout_s < MIN_EVIDENCE_S and seconds >= running.timeout_s / 2
        if end is _End.ANSWERED:
            self.directions.answered(op)
        elif end is _End.REFUSED:
            self.directions.refused(op, line)
            self._report(line)
        elif not had_no_time:
            self.directions.unanswered(op, line)
            self._report(line)

    def _trip(self, reason: str) -> None:
        self.breaker.trip()
        self._report(reason)

    def _report(self, reason: str) -> None:
        """Tell of directions that opened or closed, and let nothing wait for one that is out."""
        ways = self.directions.open_ways
        lost, won = self._told - ways, ways - self._told
        is_whole = not ways or not self._told
        self._told = ways
        for changed, is_up in ((lost, False), (won, True)):
            if changed:
                self._emit(TierState(self.name, is_up, reason, changed, is_whole))
        if lost:
            ops = [op for way in lost for op in OPS_OF[way]]
            self.counters.refused += self._drop_waiting(self._why_not(ops[0]), ops)

    def _why_not(self, op: Op) -> str:
        return "the breaker is open" if not self.breaker.allow() else f"{DIRECTION_OF[op].value}: the breaker is open"

    # -- answers without the tier, under the lock ----------------------------------------------------------------------

    def _expire(self, transfer: Transfer) -> None:
        self.counters.expired += 1
        self._refuse(transfer, "not begun by its deadline")

    def _drop_waiting(self, reason: str, ops: Collection[Op] = tuple(Op)) -> int:
        waiting = self._backlog.clear(ops)
        self.counters.queued = len(self._backlog)
        for transfer in waiting:
            self._refuse(transfer, reason)
        return len(waiting)

    def _refuse(self, transfer: Transfer, reason: str) -> None:
        line = f"tier {self.name}: {in_words(transfer)}: {reason}"
        self._emit(Outcome(transfer.id, (False,) * len(transfer.keys), error=line))

    def _line(self, transfer: Transfer, error: BaseException) -> str:
        return f"tier {self.name}: {in_words(transfer)}: {one_line(error)}"
