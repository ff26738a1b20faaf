"""The verdict on speculation: whether what it brings is used often enough, by what became of it.

Pages used and wasted are summed up, and older sums fade, so it follows the traffic. It is judged after `LEAST_PAGES`
and `LEAST_SESSIONS`: one long prompt that nobody came back to proves nothing. Under the store's lock.
"""

from __future__ import annotations

LEAST_SESSIONS = 8
LEAST_PAGES = 64
MEMORY_PAGES = 65_536.0  # at more, both sums are halved
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0


class Worth:
    """Whether speculation may go on.

    num_stopped: how often it was stopped.
    """

    def __init__(self, max_waste: float, *, may_stop: bool) -> None:
        self.num_stopped = 0
        self._max_waste = max_waste
        self._may_stop = may_stop
        self._used = self._wasted = 0.0
        self._sessions = 0
        self._pause_s = FIRST_PAUSE_S
        self._stopped_until = float("-inf")

    def began(self) -> None:
        """Pages of one more session are brought."""
        self._sessions += 1

    def book(self, used: int, wasted: int, now: float) -> None:
        """So many pages were used, and so many were not before they left."""
        self._used += used
        self._wasted += wasted
        total = self._used + self._wasted
        if total > MEMORY_PAGES:
            self._used, self._wasted = self._used / 2.0, self._wasted / 2.0
        if total < LEAST_PAGES or self._sessions < LEAST_SESSIONS or now < self._stopped_until:
            return
        if self._wasted <= self._max_waste * self._used:
            self._pause_s = FIRST_PAUSE_S
        elif self._may_stop:
            self.num_stopped += 1
            self._stopped_until = now + self._pause_s
            self._pause_s = min(2.0 * self._pause_s, LONGEST_PAUSE_S)
            self._used = self._wasted = 0.0  # after the pause it is judged anew
            self._sessions = 0

    def may_bring(self, now: float) -> bool:
        """False while it is stopped."""
        return now >= self._stopped_until

    def is_stopped(self, now: float) -> bool:
        """True while it is stopped."""
        return not self.may_bring(now)
