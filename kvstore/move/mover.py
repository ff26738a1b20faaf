"""The hands: all lanes and the housekeeper that watches them.

The store hands it the planner's transfers and hears of each exactly once through `on_outcome`. The housekeeper thread
answers for transfers that no worker carries (refused, cancelled, expired), sees to deadlines and hung workers on every
tick, and reports tiers that go down or come back, in the order in which it happened.

The hard thing: `submit` is called under the store's lock, and the callbacks take that lock. Therefore nothing is called
back from `submit` or `cancel`; what they refuse goes through an inbox to the housekeeper. And no callback runs with a
lock of ours held, so a callback may call `submit` and `cancel` itself.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec

from kvstore.errors import ConfigError, StoreClosed
from kvstore.forks import forbid, harmless
from kvstore.move.lane import Event, Lane, TierState
from kvstore.move.threads import start_all
from kvstore.plan.records import Outcome, Transfer

log = logging.getLogger(__name__)

P = ParamSpec("P")


class Mover:
    """Carries transfers to the tiers by their lanes. Any thread.

    lanes:         one per tier, not started yet.
    on_outcome:    called once per transfer, from a lane's or the housekeeper's thread.
    on_tier_state: called by the housekeeper with what went down or came back, in order.
    on_tick:       called by the housekeeper about every `tick_s`.
    now:           clock of deadlines, in seconds.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        on_outcome: Callable[[Outcome], None],
        on_tier_state: Callable[[TierState], None],
        on_tick: Callable[[], None],
        *,
        now: Callable[[], float] = time.monotonic,
        tick_s: float = 0.05,
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        if len(self.lanes) != len(lanes):
            raise ConfigError(f"mover: two lanes have one name: {[lane.name for lane in lanes]}")
        self.num_callback_errors = 0
        self.num_hung = 0  # transfers left behind in their tier by `close`: their slots are still theirs
        self._on_outcome = on_outcome
        self._on_tier_state = on_tier_state
        self._on_tick = on_tick
        self._now = now
        self._tick_s = tick_s
        self._lock = threading.Lock()  # of the two flags: after the inbox was emptied for good, nothing may enter it
        self._closing = False
        self._closed = False
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None stops the housekeeper
        self._housekeeper = threading.Thread(target=self._keep_house, name="kvstore-housekeeper", daemon=True)
        started: list[Lane] = []
        try:
            for lane in lanes:
                lane.start(self._deliver, self._inbox.put, now)
                started.append(lane)
            start_all([self._housekeeper])
        except BaseException:
            for lane in started:
                lane.stop()
                lane.join(tick_s)  # they have nothing to do
            raise
        forbid(self)

    def submit(self, transfers: Sequence[Transfer], *, again: bool = False) -> None:
        """Queue transfers in their lanes (again: as Lane.submit). Never blocks, never calls back.

        Raises StoreClosed once `close` is over.
        """
        by_tier: dict[str, list[Transfer]] = {}
        for transfer in transfers:
            by_tier.setdefault(transfer.tier, []).append(transfer)
        with self._lock:
            if self._closed:
                raise StoreClosed("the mover is closed")
            for tier, batch in by_tier.items():
                if tier in self.lanes:
                    self.lanes[tier].submit(batch, again=again)
                else:
                    for transfer in batch:
                        line = f"tier {tier}: there is no such lane; known are {sorted(self.lanes)}"
                        self._inbox.put(Outcome(transfer.id, (False,) * len(transfer.keys), error=line))

    def cancel(self, transfer_ids: Iterable[int]) -> None:
        """Drop those that no worker has begun; their outcomes say so. Never blocks, never calls back."""
        ids = list(transfer_ids)
        with self._lock:
            if not self._closed:
                for lane in self.lanes.values():
                    lane.cancel(ids)

    def promote(self, transfer_ids: Iterable[int]) -> None:
        """Move waiting prefetches to the loads. Never blocks, never calls back."""
        ids = list(transfer_ids)
        with self._lock:
            for lane in self.lanes.values():
                lane.promote(ids)

    def add(self, lane: Lane) -> None:
        """Take up one more lane, not started yet. Raises ConfigError if there is one of its name."""
        with self._lock:
            if self._closed:
                raise StoreClosed("the mover is closed")
            if lane.name in self.lanes:
                raise ConfigError(f"mover: there is a lane {lane.name!r} already")
            lane.start(self._deliver, self._inbox.put, self._now)
            self.lanes = {**self.lanes, lane.name: lane}  # a new dict: the housekeeper may be walking the old one

    def remove(self, name: str, timeout_s: float) -> bool:
        """Stop a lane and answer for what it has; False, with the lane kept, if a worker hangs in its tier.

        What waits is dropped at once. Not under the store's lock: the workers that are joined may be waiting for it.
        """
        lane = self.lanes[name]
        num_dropped = lane.stop()
        if lane.join(timeout_s):
            return False
        log.info("lane %s is removed, %d waiting transfers dropped", name, num_dropped)
        with self._lock:
            self.lanes = {other: lane for other, lane in self.lanes.items() if other != name}
        return True

    @harmless
    def close(self, timeout_s: float) -> int:
        """Drop what waits, let the workers finish what they carry, join all threads; return how many were dropped.

        A worker that hangs in its tier is left behind after `timeout_s` (a daemon thread): its transfer is answered as
        failed, counted and logged, and the slots of that transfer must not be reused. Idempotent. Not under the store's
        lock: the threads that are joined may be waiting for it.
        """
        with self._lock:
            if self._closing:
                return 0
            self._closing = True
        until = time.monotonic() + timeout_s
        num_dropped = sum(lane.stop() for lane in self.lanes.values())
        left = [name for lane in self.lanes.values() for name in lane.join(max(0.0, until - time.monotonic()))]
        num_hung = self.num_hung = sum(lane.abandon() for lane in self.lanes.values())
        self._inbox.put(None)
        if self._housekeeper is not threading.current_thread():
            self._housekeeper.join(max(self._tick_s, until - time.monotonic()))
            left += [self._housekeeper.name] if self._housekeeper.is_alive() else []
        # Answers may make the store submit more, which the closed lanes refuse into the inbox: empty it until it stays.
        while not self._inbox.empty() and time.monotonic() < until + self._tick_s:
            self._empty_inbox()
        with self._lock:
            self._closed = True
        self._empty_inbox()
        # What was emptied may have been the housekeeper's sign to stop, if it was too busy to take it in time.
        self._inbox.put(None)
        if left:
            log.warning("close: after %.1f s these threads still run: %s", timeout_s, ", ".join(left))
        if num_dropped or num_hung:
            log.info("close: dropped %d waiting transfers and %d that hung in their tier", num_dropped, num_hung)
        return num_dropped + num_hung

    # -- the housekeeper ---------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        next_tick = time.monotonic() + self._tick_s
        while True:
            with contextlib.suppress(queue.Empty):
                event = self._inbox.get(timeout=max(0.0, next_tick - time.monotonic()))
                if event is None:
                    return
                self._handle(event)
            if time.monotonic() >= next_tick:
                for lane in self.lanes.values():
                    lane.check(self._now())
                self._call(self._on_tick)
                next_tick = time.monotonic() + self._tick_s

    def _handle(self, event: Event) -> None:
        match event:
            case Outcome():
                self._deliver(event)
            case TierState():
                log.log(logging.INFO if event.is_up else logging.WARNING, "%s", _told(event))
                self._call(self._on_tier_state, event)

    def _empty_inbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._inbox.get_nowait()
                if event is not None:
                    self._handle(event)

    def _deliver(self, outcome: Outcome) -> None:
        self._call(self._on_outcome, outcome)

    def _call(self, callback: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        # A mistake in a callback must not cost the thread: without it, nobody would hear of any transfer again.
        try:
            callback(*args, **kwargs)
        except Exception:
            self.num_callback_errors += 1
            log.exception("callback %s failed", getattr(callback, "__name__", callback))


def _told(state: TierState) -> str:
    ways = ", ".join(sorted(way.value for way in state.directions))
    if state.is_whole:
        return f"tier {state.tier} is {'up' if state.is_up else 'down'}: {state.reason}"
    if state.is_up:
        return f"tier {state.tier}: {ways} is back: {state.reason}"
    return f"tier {state.tier}: {ways} is left out, the rest goes on: {state.reason}"
