"""A time to live on top of any policy.

A bound for privacy or cost, not a good order by itself: keys past their deadline leave first, the rest as the inner
policy says. A deadline is set when a key is added and moved when it is touched.

The hard thing: deadlines in order without a heap over keys. Keys of one ttl form a class, and in a class the order of
uses is the order of deadlines, so a use moves a key to the end. A heap over classes (mostly one) finds those that are
due.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import islice, repeat, takewhile
from math import inf, isnan
from typing import Generic

from eviction.policy import NO_HINT, EvictionPolicy, Hint, K

NEVER = 0.0  # a ttl that sets no deadline


class Ttl(Generic[K]):
    """An EvictionPolicy that adds deadlines to `inner`.

    ttl_s: seconds from a key's last add or touch to its deadline, for keys whose hint has none; None or 0 means never.
           A hint's ttl_s of 0 means never too, and a negative one a deadline that has passed.

    `now` should not go backwards between calls; where it does, the latest time seen counts. O(1) per key, and
    O(log classes) for each class that is due.
    """

    def __init__(self, inner: EvictionPolicy[K], ttl_s: float | None = None) -> None:
        if ttl_s is not None and not ttl_s >= 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be at least 0 seconds, where 0 or None means never")
        self._inner = inner
        self._ttl_s = NEVER if ttl_s is None or ttl_s == inf else ttl_s
        self._now = -inf
        self._classes: dict[float, OrderedDict[K, float]] = {}  # by ttl; key -> deadline, earliest first
        self._usual: OrderedDict[K, float] = self._classes.setdefault(self._ttl_s, OrderedDict())
        self._unusual: dict[K, float] = {}  # the ttl of keys in other classes
        # One entry per class with keys: (a time not after its earliest deadline, ttl). Uses and discards only move that
        # deadline away, so an entry is looked at again when its time has come, and not before.
        self._due: list[tuple[float, float]] = []
        self._in_due: set[float] = set()

    def add(self, keys: Iterable[K], now: float, hint: Hint = NO_HINT) -> None:
        """Take keys in and set their deadlines by this hint. A known key is touched."""
        keys = list(keys)
        ttl_s = self._ttl_s if hint.ttl_s is None else hint.ttl_s
        if isnan(ttl_s):
            raise ValueError("hint: ttl_s is nan; it must be a number of seconds, None or 0")
        ttl_s = NEVER if ttl_s == inf else ttl_s
        self._inner.add(keys, now, hint)
        if self._unusual or ttl_s != self._ttl_s:
            self._leave_classes(keys)
        if ttl_s != NEVER:
            self._set_deadlines(keys, self._seen(now), ttl_s)

    def touch(self, keys: Iterable[K], now: float) -> None:
        """Note a use of keys and move their deadlines. Unknown keys are ignored."""
        keys = list(keys)
        self._inner.touch(keys, now)
        now = self._seen(now)
        if self._usual:
            self._set_deadlines(list(filter(self._usual.__contains__, keys)), now, self._ttl_s)
        if self._unusual:
            for key in filter(self._unusual.__contains__, keys):
                self._set_deadlines([key], now, self._unusual[key])

    def demote(self, keys: Iterable[K]) -> None:
        """Make keys the next victims after the expired ones."""
        self._inner.demote(keys)

    def discard(self, keys: Iterable[K]) -> None:
        """Forget keys. Unknown keys are ignored."""
        keys = list(keys)
        self._inner.discard(keys)
        self._leave_classes(keys)

    def victims(self, n: int) -> list[K]:
        """Return up to `n` keys: those that had expired at the latest time seen, then as the inner policy says."""
        due = self._expired(max(n, 0))
        if not due:
            return self._inner.victims(n)
        chosen = set(due)
        return due + [key for key in self._inner.victims(n) if key not in chosen][: n - len(due)]

    def expired(self, now: float) -> list[K]:
        """Return the keys whose deadline is `now` or before, earliest first. They stay until discarded."""
        self._seen(now)
        return self._expired(None)

    def __len__(self) -> int:
        return len(self._inner)

    def __contains__(self, key: object) -> bool:
        return key in self._inner

    def _seen(self, now: float) -> float:
        self._now = max(now, self._now)
        return self._now

    def _set_deadlines(self, keys: list[K], now: float, ttl_s: float) -> None:
        if not keys:
            return
        deadlines = self._classes.setdefault(ttl_s, OrderedDict())
        deadlines.update(dict.fromkeys(keys, now + ttl_s))
        deque(map(deadlines.move_to_end, keys), maxlen=0)
        if ttl_s != self._ttl_s:
            self._unusual.update(dict.fromkeys(keys, ttl_s))
        if ttl_s not in self._in_due:
            self._in_due.add(ttl_s)
            heappush(self._due, (now + ttl_s, ttl_s))

    def _leave_classes(self, keys: list[K]) -> None:
        if self._usual:
            deque(map(self._usual.pop, keys, repeat(None)), maxlen=0)
        if self._unusual:
            for key in keys:
                ttl_s = self._unusual.pop(key, None)
                if ttl_s is not None:
                    deadlines = self._classes[ttl_s]
                    del deadlines[key]
                    if not deadlines:
                        del self._classes[ttl_s]

    def _expired(self, limit: int | None) -> list[K]:
        """Return expired keys, earliest first: all, or at least the first `limit` cut to that many."""
        now = self._now
        found: list[tuple[float, K]] = []
        looked_at: list[tuple[float, float]] = []
        while self._due and self._due[0][0] <= now:
            _, ttl_s = heappop(self._due)
            deadlines = self._classes.get(ttl_s)
            if not deadlines:
                self._in_due.remove(ttl_s)
                continue
            looked_at.append((next(iter(deadlines.values())), ttl_s))
            past = takewhile(lambda item: item[1] <= now, deadlines.items())
            found += [(deadline, key) for key, deadline in islice(past, limit)]
        for entry in looked_at:
            heappush(self._due, entry)
        if len(looked_at) > 1:
            found.sort(key=lambda item: item[0])
        return [key for _, key in found[:limit]]
