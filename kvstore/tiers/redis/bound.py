"""A bound on what one namespace keeps in Redis, where many share a server that evicts by its own lights.

Beside the pages lies a *ledger*, a sorted set: the keys of the namespace's pages by the time of their last use. Whoever
writes enters the pages first and takes out as many of the least recently used as there are too many; so the bound holds
for all machines together, and what leaves is the namespace's own. Pages enter by depth: a leaf looks older than its
parent.

    write    enter, take out what is older than the TTL, count, take out the oldest     1 round trip
             read the oldest, strike them out, delete them, write, strike out refused    0 to 4 more
    touch    enter what is there, strike out what is gone                               1 more

The hard thing: the ledger is no index, and may be wrong. Pages that the server evicted stay in it until they are the
oldest (the namespace then has less than it may); a ledger that the server evicted begins anew, and pages enter again
as they are used. Both err for a TTL at most. Entries of a clock that was ahead and has been set right would be the most
recent for as long as it was wrong, and whatever is written would leave at once: they count as used now. Every writer of
the namespace must have a bound configured: one that has none is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from kvstore.direction import Direction
from kvstore.errors import ConfigError, TierRefused
from kvstore.page import PageKey, PageMeta
from kvstore.tiers.base import StoredPage
from kvstore.tiers.redis.refusal import OOM
from kvstore.tiers.redis.tier import RedisTier

LEDGER = b"ledger"
AHEAD_S = 3600.0  # clocks of machines differ by less, or one of them is wrong
AHEAD_ENTRIES = 1000  # put right in one round trip
STEP_S = 1e-6  # between the ages of a block and of the one before it; a score has 53 bits, of which the time takes 31


class BoundedRedis:
    """A RedisTier that holds at most so many pages of its prefix. Thread rule as the tier's.

    counters.extra has one more: bound_evictions, pages that left to keep the bound.
    """

    name = "redis"

    def __init__(
        self, tier: RedisTier, capacity_pages: int, *, ttl_s: float, now: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError for a bound below one page."""
        if capacity_pages < 1:
            raise ConfigError(f"redis.capacity_bytes holds {capacity_pages} pages; it must hold one, or be 0: no bound")
        self._tier = tier
        self._most = capacity_pages
        self._ttl_s = ttl_s
        self._now = now
        self._name = tier.name_of(LEDGER)
        self.counters = tier.counters
        self.counters.extra["bound_evictions"] = 0

    @property
    def capacity_pages(self) -> int | None:
        """None: this tier makes room by itself; the planner keeps no books of it."""
        return None

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """As RedisTier."""
        return self._tier.contains(keys, timeout_s=timeout_s)

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """As RedisTier."""
        return self._tier.read_into(keys, views, metas, timeout_s=timeout_s)

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        """As RedisTier, making room first. Of a batch that is larger than the bound a part is refused."""
        until = time.monotonic() + timeout_s
        if evict:
            self.delete(evict, timeout_s=timeout_s)
        now = self._now()
        try:
            scores = [now - STEP_S * meta.depth for meta in metas]
            leaving = self._enter(keys, scores, timeout_s=until - time.monotonic())
        except TierRefused as refusal:
            if refusal.reason != OOM:
                raise
            self.counters.extra["oom_replies"] += 1  # there is no room for the ledger: neither is for pages
            return [False] * len(keys)
        if leaving:
            self._tier.delete(leaving, timeout_s=until - time.monotonic())
            self.counters.extra["bound_evictions"] += len(leaving)
        refused = set(leaving)
        kept = [i for i, key in enumerate(keys) if key not in refused]
        ok = [False] * len(keys)
        written = self._tier.write_from(
            [keys[i] for i in kept],
            [views[i] for i in kept],
            [metas[i] for i in kept],
            timeout_s=until - time.monotonic(),
        )
        for i, is_written in zip(kept, written, strict=True):
            ok[i] = is_written
        self._strike([keys[i] for i in kept if not ok[i]], timeout_s=until - time.monotonic())
        return ok

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """As RedisTier."""
        until = time.monotonic() + timeout_s
        present = self._tier.touch(keys, expires_at=expires_at, timeout_s=timeout_s)
        now = self._now()
        there = [key for key, is_there in zip(keys, present, strict=True) if is_there]
        commands = self._add(there, [now + STEP_S * i for i in range(len(there))])
        gone = [key for key, is_there in zip(keys, present, strict=True) if not is_there]
        commands += [(b"ZREM", self._name, *gone)] if gone else []
        if commands:
            self._tier.ask(self._name, commands, timeout_s=until - time.monotonic())
        return present

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """As RedisTier."""
        until = time.monotonic() + timeout_s
        self._tier.delete(keys, timeout_s=timeout_s)
        self._strike(keys, timeout_s=until - time.monotonic())

    def claim(self, keys: Sequence[PageKey], *, token: bytes, lease_s: float, timeout_s: float) -> list[bool]:
        """As RedisTier; claims are not counted."""
        return self._tier.claim(keys, token=token, lease_s=lease_s, timeout_s=timeout_s)

    def unclaim(self, keys: Sequence[PageKey], *, token: bytes, timeout_s: float) -> None:
        """As RedisTier."""
        self._tier.unclaim(keys, token=token, timeout_s=timeout_s)

    def sweep(self, *, timeout_s: float) -> int:
        """As RedisTier; the ledger goes along."""
        return self._tier.sweep(timeout_s=timeout_s)

    def scan(self) -> Iterator[StoredPage]:
        """As RedisTier."""
        return self._tier.scan()

    def probe(self, way: Direction, *, timeout_s: float) -> None:
        """As RedisTier, and whether the ledger may be written."""
        until = time.monotonic() + timeout_s
        self._tier.probe(way, timeout_s=timeout_s)
        if way is not Direction.READ:
            self._strike([PageKey(b"probe")], timeout_s=until - time.monotonic())

    def ping(self, *, timeout_s: float) -> None:
        """As RedisTier."""
        self._tier.ping(timeout_s=timeout_s)

    def close(self) -> None:
        """As RedisTier."""
        self._tier.close()

    # -- private

    def _enter(self, keys: Sequence[PageKey], scores: Sequence[float], *, timeout_s: float) -> list[PageKey]:
        """Enter pages that are about to be written; returns those that have to leave for it."""
        if not keys:
            return []
        commands = self._add(keys, scores)
        if self._ttl_s:
            oldest = min(scores) - self._ttl_s
            commands.append((b"ZREMRANGEBYSCORE", self._name, b"-inf", b"(%r" % oldest))
        commands.append((b"ZCOUNT", self._name, b"(%r" % (max(scores) + AHEAD_S), b"+inf"))
        commands.append((b"ZCARD", self._name))
        num_ahead, count = self._tier.ask(self._name, commands, timeout_s=timeout_s)[-2:]
        if isinstance(num_ahead, int) and num_ahead:
            self._bring_back(min(scores) - STEP_S, max(scores) + AHEAD_S, timeout_s=timeout_s)
        if not isinstance(count, int) or count <= self._most:
            return []
        # Read, then taken out by name: two machines that find too many at the same moment name the same ones.
        until = time.monotonic() + timeout_s
        scan = (b"ZRANGEBYSCORE", self._name, b"-inf", b"+inf", b"LIMIT", 0, count - self._most)
        members, count = self._tier.ask(self._name, [scan, (b"ZCARD", self._name)], timeout_s=timeout_s)
        if not isinstance(members, list) or not isinstance(count, int) or count <= self._most:
            return []
        leaving = [PageKey(member) for member in members[: count - self._most]]
        self._strike(leaving, timeout_s=until - time.monotonic())
        return leaving

    def _bring_back(self, score: float, most: float, *, timeout_s: float) -> None:
        """Give entries above `most` the age `score`."""
        until = time.monotonic() + timeout_s
        scan = (b"ZRANGEBYSCORE", self._name, b"(%r" % most, b"+inf", b"LIMIT", 0, AHEAD_ENTRIES)
        while time.monotonic() < until:
            members = self._tier.ask(self._name, [scan], timeout_s=until - time.monotonic())[0]
            if not isinstance(members, list) or not members:
                return
            pairs = [part for member in members for part in (b"%r" % score, member)]
            self._tier.ask(self._name, [(b"ZADD", self._name, *pairs)], timeout_s=until - time.monotonic())

    def _strike(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        if keys:
            self._tier.ask(self._name, [(b"ZREM", self._name, *keys)], timeout_s=timeout_s)

    def _add(self, keys: Sequence[PageKey], scores: Sequence[float]) -> list[tuple[bytes | int, ...]]:
        if not keys:
            return []
        pairs = [part for key, score in zip(keys, scores, strict=True) for part in (b"%r" % score, bytes(key))]
        lifetime = [(b"PEXPIRE", self._name, int(self._ttl_s * 1000))] if self._ttl_s else []
        return [(b"ZADD", self._name, *pairs), *lifetime]
