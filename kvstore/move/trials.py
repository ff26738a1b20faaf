"""Tests of a tier, or of a direction of it, that is out: due after a back-off, and each in a thread of its own.

In a thread of its own, because a test that hangs must hold up neither the other tiers nor the last worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from kvstore.direction import Direction
from kvstore.move.breaker import Breaker
from kvstore.move.calls import one_line
from kvstore.move.directions import Directions
from kvstore.move.threads import start_thread
from kvstore.tiers.base import Probing, Tier


class Trials:
    """Tries one tier again, and tells its breakers. `start_due` under the lane's lock.

    lock:   the lane's; taken to book what a test has shown.
    report: called then, with why directions may have opened.
    """

    def __init__(
        self,
        tier: Tier,
        breaker: Breaker,
        directions: Directions,
        timeout_s: float,
        lock: threading.Condition,
        report: Callable[[str], None],
    ) -> None:
        self.threads: list[threading.Thread] = []
        self._tier = tier
        self._breaker = breaker
        self._directions = directions
        self._timeout_s = timeout_s
        self._lock = lock
        self._report = report

    def start_due(self, now: float) -> int:
        """Start the tests that are due; returns how many."""
        num_started = 0
        if self._breaker.due(now):
            self._breaker.probe()
            self._start(self._ping, partial(self._breaker.probed, False))
            num_started += 1
        for way in self._directions.due(now):
            self._directions.breakers[way].probe()
            self._start(partial(self._probe, way), partial(self._directions.probed, way, "no thread to try it"))
            num_started += 1
        return num_started

    def _start(self, test: Callable[[], None], fail: Callable[[], None]) -> None:
        thread = threading.Thread(target=test, name=f"kvstore-{self._tier.name}-ping", daemon=True)
        if start_thread(thread):
            self.threads = [*(one for one in self.threads if one.is_alive()), thread]
        else:
            fail()

    def _ping(self) -> None:
        try:
            self._tier.ping(timeout_s=self._timeout_s)
            answered = True
        except BaseException:  # this thread's top; whatever it was, the next ping is due after the back-off
            answered = False
        with self._lock:
            self._breaker.probed(answered)
            self._report("it answers again")

    def _probe(self, way: Direction) -> None:
        reason = None
        try:
            if isinstance(self._tier, Probing):
                self._tier.probe(way, timeout_s=self._timeout_s)
            else:
                self._tier.ping(timeout_s=self._timeout_s)
        except BaseException as error:  # as above
            reason = f"tier {self._tier.name}: {way.value}: {one_line(error)}"
        with self._lock:
            self._directions.probed(way, reason)
            self._report("it is done again")
