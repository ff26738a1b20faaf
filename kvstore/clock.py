"""The one source of time: which clock says what, and who notices that one was set.

    steady()  waits: deadlines of calls, back-offs, leases. Never set, and stands still while the machine sleeps: no
              wait is over only because somebody closed a lid.
    wall()    what is written down for other processes and times to come: deadlines on disk and in Redis, and what
              callers say in Unix time. It may be set, forward and backward, by any amount.
    boot()    how long pages have been in this process' memory. Never set, and goes on while the machine sleeps: a
              time to live of an hour is over after a night, and is not touched by a correction of the wall clock.

The hard thing: the difference of two of these clocks is no constant. A difference that is kept is a second copy of a
clock, which is wrong from the next correction on; so all three are asked anew wherever a time is made or judged, and
are handed on as callables. Tests pass their own. Any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

log = logging.getLogger(__name__)

# A correction by slewing moves the wall clock by at most 500 millionths: nothing between two looks, 50 ms apart.
LARGE_STEP_S = 1.0


# Seconds since the machine was started, with those that it slept. Where a system has no CLOCK_BOOTTIME (macOS), its
# monotonic clock goes on in sleep.
boot_time: Callable[[], float] = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Three clocks, in seconds. See the module.

    `look` is called again and again by whoever keeps house, and logs each large step once.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        boot: Callable[[], float] = boot_time,
    ) -> None:
        self.wall = wall
        self.steady = steady
        self.boot = boot
        self.num_steps = 0
        self._lock = threading.Lock()  # of what was seen: many stores of one process look
        self._seen: tuple[float, float] | None = None  # wall and steady time, as differences from the boot clock

    def look(self) -> None:
        """Notice that the wall clock was set, or that the machine slept, since the last look."""
        with self._lock:
            boot = self.boot()
            now = (self.wall() - boot, self.steady() - boot)
            before, self._seen = self._seen, now
            if before is None:
                return
            set_by, slept = now[0] - before[0], before[1] - now[1]
            self.num_steps += abs(set_by) >= LARGE_STEP_S
        if abs(set_by) >= LARGE_STEP_S:
            log.warning(
                "the wall clock was set %s by %.1f s; times to live on disk and Redis go by it as it is now",
                "forward" if set_by > 0 else "back",
                abs(set_by),
            )
        if slept >= LARGE_STEP_S:
            log.warning("this machine slept for %.1f s; times to live went on, waits did not", slept)


SYSTEM_CLOCK = Clock()
