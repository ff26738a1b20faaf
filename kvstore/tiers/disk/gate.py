"""Counts calls in flight, so that what they use can be closed under none of them.

LMDB unmaps its file on close: a thread that is reading at that moment dies with the whole process.
"""

from __future__ import annotations

import threading
import time

from kvstore.errors import TierUnavailable


class Gate:
    """Open, shut or paused; calls pass while it is open, wait while it is paused. Any thread."""

    def __init__(self) -> None:
        """A shut gate."""
        self._lock = (
            threading.RLock()
        )  # entered itself: a Condition's own `__enter__` can be interrupted when it has it
        self._changed = threading.Condition(self._lock)
        self._inside: set[object] = set()
        self._reason: str | None = "not opened yet"
        self._pause_s: float | None = None

    def enter(self, call: object) -> None:
        """Begin a call, which `leave` ends, after an exception in here too.

        Raises TierUnavailable with the reason while the gate is shut, or paused for too long.
        """
        with self._lock:
            if self._pause_s is not None and not self._changed.wait_for(lambda: self._pause_s is None, self._pause_s):
                raise TierUnavailable("disk tier: the gate was paused for too long")
            if self._reason is not None:
                raise TierUnavailable(self._reason)
            self._inside.add(call)

    def leave(self, call: object) -> None:
        """End a call. Idempotent."""
        with self._lock:
            self._inside.discard(call)
            if not self._inside:
                self._changed.notify_all()

    def open(self) -> None:
        """Admit calls."""
        with self._lock:
            self._reason = self._pause_s = None
            self._changed.notify_all()

    def shut(self, reason: str) -> None:
        """Refuse all further calls, and tell each why."""
        with self._lock:
            self._reason, self._pause_s = reason, None
            self._changed.notify_all()

    def pause(self, longest_s: float) -> None:
        """Make calls wait, each at most `longest_s`, until `open` or `shut`."""
        with self._lock:
            self._pause_s = longest_s

    def drain(self, timeout_s: float) -> bool:
        """Wait until no call is inside; False if some still are after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            return self._changed.wait_for(lambda: not self._inside, max(0.0, deadline - time.monotonic()))
