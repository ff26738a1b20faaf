"""Between planner and mover, under the store's one lock: what is planned is handed on, what came of it is booked.

Planning happens under the lock and takes microseconds; bytes never move under it. Lanes report outcomes from their own
threads, the housekeeper reports ticks and tiers that went down or came back; each takes the lock, lets the planner book
it, hands on what the planner wants carried next, and wakes whoever waits.

    with dispatcher.lock, dispatcher.step(tell=True) as now:    # raises StoreClosed
        ...plan...

    dispatcher.carry_out(planner.in_steps.forget(request, 0, now), tell=True)   # a long prompt: many such steps

A step hands on what was planned when it ends; `tell` wakes whoever waits, after what others may wait for. It is all or
nothing for those who come after it: where an exception from outside (Ctrl-C, a signal, no memory) has cut a step short,
the next one finds that out and mends the books first (plan/mend.py). So a step needs no code for being interrupted, and
costs two assignments. The lock is taken by its own `with`: a context manager in Python may be interrupted between
taking it and being entered, the lock's own cannot.

The hard thing: a slot must not be reused while anything may still write to it. Slots are freed only by outcomes and
by the ends of leases, and a lane answers for a transfer only when its worker has returned from the tier; so waiting
has deadlines, slots do not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

from kvstore.errors import StoreClosed
from kvstore.forks import forbid
from kvstore.move.lane import Lane, TierState
from kvstore.move.mover import Mover
from kvstore.plan.flushing import Flushing, Told
from kvstore.plan.planner import Planner
from kvstore.plan.records import FlushResult, Outcome
from kvstore.plan.steps import Steps
from kvstore.plan.transfers import TransferBook

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

BREATH_S = 20e-6  # 80 us with the kernel's timer slack: long enough to wake up in, 2 % of a step


def silent_after_close(verb: Callable[P, None]) -> Callable[P, None]:
    """End quietly: a verb that ends something does nothing when the store is closed, since it has ended then."""

    @wraps(verb)
    def silent(*args: P.args, **kwargs: P.kwargs) -> None:
        with suppress(StoreClosed):
            verb(*args, **kwargs)

    return silent


class _Step:
    """One step of the planner, as a context that gives the planner's time. Under the lock; stateless, so used again."""

    __slots__ = ("_even_closed", "_host", "_tell")

    def __init__(self, host: Dispatcher, *, tell: bool, even_closed: bool = False) -> None:
        self._host = host
        self._tell = tell
        self._even_closed = even_closed

    def __enter__(self) -> float:
        self._host._begin(even_closed=self._even_closed)
        return self._host.now()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._host._end(tell=self._tell)


class Dispatcher:
    """The lock, the planner it guards, and the mover that carries for it. Made and closed by LocalStore.

    lock:    held for planning, never while bytes move; not reentrant.
    discard: gives the memory of slots back to the system.
    now:     the planner's clock, in seconds.
    """

    def __init__(
        self,
        planner: Planner,
        lanes: Sequence[Lane],
        discard: Callable[[Sequence[int]], None],
        now: Callable[[], float],
    ) -> None:
        self.lock = threading.Lock()
        self.planner = planner
        self.now = now
        self.is_closed = False
        self._changed = threading.Condition(self.lock)
        self._listeners: list[Callable[[], None]] = []
        self._is_torn = False  # a step has begun and not ended
        self._last_lease = 0  # when it began
        self.num_mended = 0
        self._arrived: deque[Outcome] = deque()  # not booked yet
        self._quiet_step = _Step(self, tell=False)
        self._telling_step = _Step(self, tell=True)
        self._late_step = _Step(self, tell=False, even_closed=True)
        self._late_telling_step = _Step(self, tell=True, even_closed=True)
        self._discard = discard
        self.mover = Mover(lanes, self._on_outcome, self._on_tier_state, self._on_tick, now=now)
        forbid(self)

    # ---- under the lock ---------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise StoreClosed after close; see to it that the books are whole."""
        if self.is_closed:
            raise StoreClosed("the store is closed")
        self.settle()

    def step(self, *, tell: bool = False) -> _Step:
        """A step that changes the books, see the module. tell: others may wait for what it does."""
        return self._telling_step if tell else self._quiet_step

    def carry_out(self, steps: Steps[T], *, tell: bool = False) -> T:
        """Carry out what the planner does in steps, letting others in between two of them. Not under the lock."""
        step = self._telling_step if tell else self._quiet_step
        while True:
            with self.lock, step:
                try:
                    next(steps)
                except StopIteration as over:
                    answer: T = over.value
                    return answer
            # A lock that is let go and taken again at once is not seen free by those who sleep on it.
            time.sleep(BREATH_S)

    def settle(self) -> None:
        """If a step was cut short by an exception, put the books right. May be cut short itself, and begins anew then.

        Whatever only reads the books calls this before.
        """
        if self._is_torn:
            log.warning("a step was interrupted by an exception: the books are mended")
            self.planner.mend(self._last_lease, self.now())
            self.num_mended += 1
            self._end(tell=True, again=True)

    def tell(self) -> None:
        """Wake whoever waits."""
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def wait(self, timeout_s: float) -> bool:
        """Release the lock until `tell` or the timeout; False for the latter."""
        return self._changed.wait(timeout_s)

    def wait_until(self, until: float) -> bool:
        """The same, up to a moment of time.monotonic(); False at once where that is over."""
        left = until - time.monotonic()
        return left > 0 and self._changed.wait(left)

    def free_retired(self) -> None:
        """Give the memory of slots that are out of use back to the system."""
        self._discard(self.planner.books.host.pool.take_retired())

    def is_flushed(self, flushing: Flushing) -> bool:
        """True if a flush has come to its end, or the store to its own."""
        with self._late_step as now:
            return self.is_closed or flushing.is_over(now)

    # ---- not under the lock -----------------------------------------------------------------------------------

    @property
    def lanes(self) -> Mapping[str, Lane]:
        """The lanes there are now, by the name of their tier."""
        return self.mover.lanes

    def listen(self, listener: Callable[[], None]) -> None:
        """Register `listener`, which every `tell` calls under the lock."""
        with self.lock:
            self._listeners.append(listener)

    def flush(self, timeout_s: float, told: Told) -> FlushResult:
        """Wait until everything saved and deleted so far is so on its tiers, or cannot be made so now."""
        until = time.monotonic() + timeout_s
        with self.lock:
            self.settle()
            flushing = self.planner.flushing()
            while not self.is_flushed(flushing) and self.wait_until(until):
                pass
            return self.planner.flush_result(told)

    def close(self) -> bool:
        """Refuse all further calls, wake all that wait; False if it is closed already. The mover is closed after."""
        with self.lock:
            if self.is_closed:
                return False
            self.is_closed = True
            self.tell()
            return True

    # ---- callbacks of the mover -------------------------------------------------------------------------------

    def _on_outcome(self, outcome: Outcome) -> None:
        self._arrived.append(outcome)
        with self.lock:
            self._book_arrived()

    def _book_arrived(self) -> None:
        """Book outcomes. One that was interrupted is booked again: what is booked already is ignored then."""
        while self._arrived:
            with self._late_telling_step as now:
                self.planner.outcome(self._arrived[0], now)
            self._arrived.popleft()

    def _on_tier_state(self, state: TierState) -> None:
        with self.lock, self._late_telling_step as now:
            self.planner.set_tier_up(state.tier, state.is_up, now, state.directions)

    def _on_tick(self) -> None:
        self.planner.books.clock.look()
        with self.lock:
            self._book_arrived()
        with suppress(StoreClosed):
            if self.carry_out(self.planner.in_steps.tick(self.now())):
                with self.lock:
                    self.tell()
        with self.lock:
            if not self.is_closed:
                self.free_retired()

    # ---- what a step is -------------------------------------------------------------------------------------------

    def _begin(self, *, even_closed: bool) -> None:
        if self.is_closed and not even_closed:
            raise StoreClosed("the store is closed")
        if self._is_torn:
            self.settle()
        self._last_lease = self.planner.in_steps.last_lease
        self._is_torn = True

    def _end(self, *, tell: bool = False, again: bool = False) -> None:
        """Hand the planner's transfers to the lanes, under the lock, so that they go out in the planner's order."""
        transfers = self.planner.books.transfers
        if transfers.outbox or transfers.promoted:
            self._hand_on(transfers, again=again)
        if tell:
            self.tell()
        self._is_torn = False

    def _hand_on(self, transfers: TransferBook, *, again: bool) -> None:
        if not self.is_closed:
            self.mover.submit(transfers.outbox, again=again)
            if transfers.promoted:
                self.mover.promote(transfers.promoted)
        transfers.sent()
