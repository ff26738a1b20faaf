"""A tier that fails on command, or by chance with a seed.

It wraps any tier and keeps the contract of `kvstore/tiers/base.py` while it fails: a lost page is a miss, a corrupt one
leaves rubbish in its slot and answers False, a medium that is away raises TierUnavailable. Only `fail` with another
error and `hang(honour_timeout=False)` break it, as a bug or a dying disk would.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvstore.errors import TierUnavailable
from kvstore.page import PageKey, PageMeta
from kvstore.tiers.base import StoredPage, Tier

HANG_LIMIT_S = 60.0  # a test that forgets to resume ends all the same
RUBBISH = 0xA5
METHODS = ("contains", "read_into", "write_from", "touch", "delete", "ping")


@dataclass(frozen=True, slots=True)
class Chances:
    """How often a fault happens, 0 to 1: the first three per call, the others per page.

    unavailable: the call raises TierUnavailable.
    unexpected:  the call raises OSError, which no tier should let out.
    slow:        the call takes `slow_s` longer.
    lose:        the page is gone: a read misses and deletes it, a write answers True and stores nothing.
    corrupt:     a read finds it damaged: rubbish in the slot, answer False, and the copy is dropped and counted.
    """

    unavailable: float = 0.0
    unexpected: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0
    lose: float = 0.0
    corrupt: float = 0.0


class FaultyTier:
    """Any tier, with faults. Any thread.

    calls:       how often each method was called, faults included.
    max_at_once: most calls inside it at one moment.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        chances: Chances | None = None,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self.name = inner.name
        self.counters = inner.counters
        self.chances = chances or Chances()
        self.calls: Counter[str] = Counter()
        self.max_at_once = 0
        self._random = random.Random(seed)
        self._sleep = sleep
        self._changed = threading.Condition()  # of everything below
        self._error: BaseException | None = None
        self._failures_left = 0.0
        self._failing: Collection[str] = ()
        self._hanging: Collection[str] = ()
        self._honour_timeout = True
        self._delay_s = 0.0
        self._lose_left = 0
        self._corrupt_left = 0
        self._num_inside = 0
        self._num_hanging = 0

    # -- commands ------------------------------------------------------------------------------------------------------

    def fail(
        self, times: float = float("inf"), error: BaseException | None = None, *, only: Collection[str] = METHODS
    ) -> None:
        """Let the next `times` calls of the methods `only` raise `error` (TierUnavailable by default)."""
        with self._changed:
            self._failing = only
            self._failures_left = times
            self._error = error or TierUnavailable(f"tier {self.name} was told to fail")

    def hang(self, *, honour_timeout: bool = True, only: Collection[str] = METHODS) -> None:
        """Let calls of the methods `only` wait for `recover`.

        With `honour_timeout` they raise TierUnavailable when their time is up.
        """
        with self._changed:
            self._hanging, self._honour_timeout = only, honour_timeout

    def slow_down(self, seconds: float) -> None:
        """Let every call take so much longer."""
        self._delay_s = seconds

    def lose_next(self, num_pages: int) -> None:
        """Lose the next pages that are read or written."""
        with self._changed:
            self._lose_left = num_pages

    def corrupt_next(self, num_pages: int) -> None:
        """Find the next pages that are read damaged."""
        with self._changed:
            self._corrupt_left = num_pages

    def recover(self) -> None:
        """End every fault, the chances too, and let those who hang go on."""
        with self._changed:
            self.chances = Chances()
            self._failures_left = self._delay_s = 0.0
            self._lose_left = self._corrupt_left = 0
            self._hanging = ()
            self._changed.notify_all()

    def wait_for_hanging(self, num_calls: int = 1, timeout_s: float = 10.0) -> None:
        """Block until so many calls hang; AssertionError if they do not come."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_hanging >= num_calls, timeout_s), "nobody came to hang"

    # -- Tier ----------------------------------------------------------------------------------------------------------

    @property
    def capacity_pages(self) -> int | None:
        return self.inner.capacity_pages

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        with self._inside("contains", timeout_s):
            return self.inner.contains(keys, timeout_s=timeout_s)

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        with self._inside("read_into", timeout_s):
            ok = self.inner.read_into(keys, views, metas, timeout_s=timeout_s)
            for index, key in enumerate(keys):
                if ok[index] and self._meets("lose"):
                    ok[index] = False
                    self.inner.delete([key], timeout_s=timeout_s)
                elif ok[index] and self._meets("corrupt"):
                    ok[index] = False
                    views[index][:] = bytes([RUBBISH]) * len(views[index])
                    self.inner.delete([key], timeout_s=timeout_s)
                    self.counters.corrupt_pages += 1
            return ok

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        with self._inside("write_from", timeout_s):
            lost = [self._meets("lose") for _ in keys]
            kept = [index for index, is_lost in enumerate(lost) if not is_lost]
            answers = self.inner.write_from(
                [keys[i] for i in kept],
                [views[i] for i in kept],
                [metas[i] for i in kept],
                evict=evict,
                timeout_s=timeout_s,
            )
            by_index = dict(zip(kept, answers, strict=True))
            return [by_index.get(index, True) for index in range(len(keys))]

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        with self._inside("touch", timeout_s):
            return self.inner.touch(keys, expires_at=expires_at, timeout_s=timeout_s)

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        with self._inside("delete", timeout_s):
            self.inner.delete(keys, timeout_s=timeout_s)

    def scan(self) -> Iterator[StoredPage]:
        return self.inner.scan()

    def ping(self, *, timeout_s: float) -> None:
        with self._inside("ping", timeout_s):
            self.inner.ping(timeout_s=timeout_s)

    def close(self) -> None:
        self.recover()
        self.inner.close()

    # -- faults --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _inside(self, method: str, timeout_s: float) -> Iterator[None]:
        try:
            self._enter(method, timeout_s)
            yield
        finally:
            with self._changed:
                self._num_inside -= 1

    def _enter(self, method: str, timeout_s: float) -> None:
        """Meet the faults of a call; raises what it shall raise."""
        with self._changed:
            self.calls[method] += 1
            self._num_inside += 1
            self.max_at_once = max(self.max_at_once, self._num_inside)
            chances = self.chances
            delay_s = self._delay_s + (chances.slow_s if self._random.random() < chances.slow else 0.0)
            is_unavailable = self._random.random() < chances.unavailable
            is_unexpected = self._random.random() < chances.unexpected
            if self._failures_left > 0 and method in self._failing:
                self._failures_left -= 1
                assert self._error is not None
                raise type(self._error)(*self._error.args)  # a new one: a traceback would keep the caller's slots alive
            if method in self._hanging:
                self._num_hanging += 1
                self._changed.notify_all()
                limit_s = min(timeout_s, HANG_LIMIT_S) if self._honour_timeout else HANG_LIMIT_S
                resumed = self._changed.wait_for(lambda: method not in self._hanging, limit_s)
                self._num_hanging -= 1
                if not resumed:
                    raise TierUnavailable(f"tier {self.name} did not answer within {limit_s} s")
        if delay_s > timeout_s:
            self._sleep(timeout_s)
            raise TierUnavailable(f"tier {self.name} did not answer within {timeout_s} s")
        if delay_s:
            self._sleep(delay_s)
        if is_unavailable:
            raise TierUnavailable(f"tier {self.name} is away, by chance")
        if is_unexpected:
            raise OSError(5, f"tier {self.name} is broken, by chance")

    def _meets(self, fault: str) -> bool:
        with self._changed:
            if fault == "lose" and self._lose_left:
                self._lose_left -= 1
                return True
            if fault == "corrupt" and self._corrupt_left:
                self._corrupt_left -= 1
                return True
            chance: float = getattr(self.chances, fault)
            return self._random.random() < chance
