"""Writes what policies have learned (kvstore/learned.py) now and then, off the path of requests and off the lock.

The tables are taken under the lock, in a millisecond; turning them into a file and writing it is this thread's. A
process that is killed loses what was learned since the last time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from kvstore.forks import forbid
from kvstore.learned import Learned
from kvstore.move.threads import start_thread

log = logging.getLogger(__name__)

WRITE_EVERY_S = 300.0
CLOSE_WITHIN_S = 5.0

Taken = dict[str, tuple[str, dict[str, Any]]]  # by tier: a policy's name and its tables


class LearnedWriter:
    """`begin` and `close` by the store's owner; `write_now` of any thread."""

    def __init__(self, learned: Learned, take: Callable[[], Taken]) -> None:
        """take: what is learned by now. Takes the store's lock."""
        self.learned = learned
        self._take = take
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        forbid(self)

    def begin(self) -> None:
        """Write from now on. Idempotent."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="kvstore-learned", daemon=True)
            if start_thread(thread):
                self._thread = thread
            else:
                log.warning("no thread is to be had: what policies learn is written at close only")

    def write_now(self) -> None:
        """Write what has changed. Blocks; raises nothing."""
        with self._writing:
            try:
                taken = self._take()
            except Exception as error:  # somebody else's policy may raise anything
                self.learned.num_failed += 1
                log.warning("a policy does not tell what it learned: %s: %s", type(error).__name__, error)
                return
            self.learned.write(taken)

    def close(self) -> None:
        """Write for the last time, within some seconds: a medium that hangs is not waited for. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_WITHIN_S)
        else:
            self.write_now()

    def _run(self) -> None:
        while not self._closing.wait(WRITE_EVERY_S):
            self.write_now()
        self.write_now()
