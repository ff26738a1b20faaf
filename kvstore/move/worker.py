"""One background thread for small jobs, done in order.

Connectors use it to copy saved blocks from the engine into host slots off the request's path. It is bounded: a job that
finds the queue full is refused, and the caller skips the save instead of waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from kvstore.errors import ConfigError
from kvstore.forks import forbid, harmless
from kvstore.move.threads import start_all

log = logging.getLogger(__name__)

Job = Callable[[], object]


class Worker:
    """Runs callables one after another. Any thread.

    cpus:       where its thread runs, if not where the one that makes it does.
    num_done:   jobs that ended.
    num_errors: of those, the ones that raised; the error is logged and goes no further.
    """

    def __init__(self, name: str, max_queue: int = 64, *, cpus: Collection[int] | None = None) -> None:
        if max_queue < 1:
            raise ConfigError(f"worker {name}: max_queue is {max_queue}; it must be at least 1")
        self.name = name
        self.num_done = 0
        self.num_errors = 0
        self._max_queue = max_queue
        self._cpus = cpus
        self._jobs: deque[tuple[Job, Job]] = deque()  # and what to do where it is lost
        self._num_submitted = 0
        self._closing = False
        self._changed = threading.Condition(threading.Lock())
        self._thread = threading.Thread(target=self._work, name=f"kvstore-{name}", daemon=True)
        start_all([self._thread])
        forbid(self)

    def submit(self, job: Job, *, lost: Job = lambda: None) -> bool:
        """Queue a job; False, and nothing is kept, where the queue is full or the worker closed. Never blocks.

        lost: called if the job is dropped by `close`, or cut short or kept from running by an exception from outside;
              whoever waits for the job would wait for ever. It may have come to its end all the same. Any thread;
              it must not use the worker.
        """
        with self._changed:
            if self._closing or len(self._jobs) >= self._max_queue:
                return False
            self._jobs.append((job, lost))
            self._num_submitted += 1
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until all jobs submitted so far have ended; False if the time ran out or close dropped some."""
        with self._changed:
            target = self._num_submitted
            return self._changed.wait_for(lambda: self.num_done >= target, timeout_s)

    @harmless
    def close(self, timeout_s: float) -> int:
        """Finish what is queued, at most `timeout_s`, then drop the rest and join; return how many were dropped.

        Idempotent. A job that hangs is left behind with its thread, and logged.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._jobs, timeout_s)
            num_dropped = self._drop()
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                log.warning("worker %s: after %.1f s its job still runs", self.name, timeout_s)
        if num_dropped:
            log.warning("worker %s: closed with %d jobs not done", self.name, num_dropped)
        return num_dropped

    def _work(self) -> None:
        if self._cpus:
            with contextlib.suppress(OSError):  # one that may not move works all the same
                os.sched_setaffinity(0, self._cpus)  # of this thread alone
        try:
            while (taken := self._take()) is not None:
                self._do(*taken)
                del taken  # it may hold tensors
        finally:  # also where an exception from outside ends the thread: nothing is accepted that nobody will do
            with self._changed:
                self._closing = True
                self._drop()
                self._changed.notify_all()

    def _do(self, job: Job, lost: Job) -> None:
        failed = True
        try:
            job()
            failed = False
        except BaseException as error:  # this thread's top: a job that fails must not take those after it along
            log.exception("worker %s: a job failed", self.name)
            if not isinstance(error, Exception):
                lost()
        with self._changed:
            self.num_done += 1
            self.num_errors += failed
            self._changed.notify_all()

    def _take(self) -> tuple[Job, Job] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            taken = self._jobs.popleft() if self._jobs else None
            self._changed.notify_all()  # close waits for an empty queue
            return taken

    def _drop(self) -> int:
        """Lose what is queued; returns how many jobs. With the lock."""
        jobs = list(self._jobs)
        self._jobs.clear()
        for _, lost in jobs:
            lost()
        return len(jobs)
