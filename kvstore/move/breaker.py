"""A circuit breaker: takes a failing tier out at once, and says when to ask it again.

    CLOSED ---- failures_to_open failures in a row, or trip() ----> OPEN
    OPEN ------ the back-off is over: due(), then probe() --------> HALF_OPEN
    HALF_OPEN - probed(True) -> CLOSED;  probed(False) -> OPEN

Each opening doubles the back-off, and only a transfer that was answered resets it: a tier that answers pings and fails
at work is not asked to work once a second.

Only the ping closes it, never a request: while it is not CLOSED no request is let through, so none has to wait to find
out. It is pure: no thread and no lock; the lane calls it under the lane's lock.

The hard thing: answers of transfers that began before it opened arrive late. They say nothing about the tier now, so
`success` and `failure` count in CLOSED only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from kvstore.errors import ConfigError


class BreakerState(Enum):
    """The state of a breaker."""

    CLOSED = "closed"  # the tier is up
    OPEN = "open"  # the tier is down and left alone until the back-off is over
    HALF_OPEN = "half_open"  # the tier is down and being pinged


class Breaker:
    """Counts failures of one tier. Under the lane's lock.

    failures_to_open: failures in a row, with no success between, that open it.
    probe_after_s:    first back-off; it doubles with every opening, up to `probe_max_s`.
    now:              clock in seconds.
    """

    def __init__(
        self,
        failures_to_open: int = 3,
        probe_after_s: float = 1.0,
        probe_max_s: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures_to_open < 1:
            raise ConfigError(f"breaker: failures_to_open is {failures_to_open}; it must be at least 1")
        if not 0 < probe_after_s <= probe_max_s:
            raise ConfigError(
                f"breaker: probe_after_s is {probe_after_s} and probe_max_s {probe_max_s}; "
                "the first must be positive and not above the second"
            )
        self.state = BreakerState.CLOSED
        self.num_opened = 0
        self.failures_to_open = failures_to_open
        self._probe_after_s = probe_after_s
        self._probe_max_s = probe_max_s
        self._now = now
        self._failures = 0
        self._backoff_s = probe_after_s
        self._probe_at = 0.0

    def sibling(self) -> Breaker:
        """Another breaker with the same numbers and clock, closed."""
        return Breaker(self.failures_to_open, self._probe_after_s, self._probe_max_s, self._now)

    def allow(self) -> bool:
        """True if transfers may be sent to the tier."""
        return self.state is BreakerState.CLOSED

    def success(self) -> None:
        """Note that a transfer was answered."""
        if self.state is BreakerState.CLOSED:
            self._failures = 0
            self._backoff_s = self._probe_after_s

    def failure(self) -> None:
        """Note that a transfer was not answered; the last of several in a row opens the breaker."""
        if self.state is not BreakerState.CLOSED:
            return
        self._failures += 1
        if self._failures >= self.failures_to_open:
            self.trip()

    def trip(self) -> None:
        """Open at once: what was seen leaves no doubt. Does nothing unless CLOSED."""
        if self.state is BreakerState.CLOSED:
            self.num_opened += 1
            self._open()

    def due(self, now: float) -> bool:
        """True if it is time to ping the tier."""
        return self.state is BreakerState.OPEN and now >= self._probe_at

    def probe(self) -> None:
        """Note that a ping is on its way; until `probed`, no other is due."""
        assert self.state is BreakerState.OPEN, self.state
        self.state = BreakerState.HALF_OPEN

    def probed(self, answered: bool) -> None:
        """Note how the ping ended."""
        assert self.state is BreakerState.HALF_OPEN, self.state
        if answered:
            self.state = BreakerState.CLOSED
            self._failures = 0
        else:
            self._open()

    def probe_in_s(self, now: float) -> float:
        """Seconds until the next ping is due; 0 if none is being waited for."""
        return max(0.0, self._probe_at - now) if self.state is BreakerState.OPEN else 0.0

    def _open(self) -> None:
        self.state = BreakerState.OPEN
        self._probe_at = self._now() + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, self._probe_max_s)
