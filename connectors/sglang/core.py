"""The backend without SGLang: pages of its pools by SGLang's hashes, on the tiers of an exchange.

    find   which pages the tiers have
    load   pages into SGLang's host memory; what does not come in time, or is not what it was, is a miss
    save   pages out of SGLang's host memory
    clear  delete what the tiers hold

Any thread: SGLang asks, loads and saves in a thread each. Nothing is raised; what fails is counted, and logged now and
then.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from connectors.sglang.pools import HostPool
from kvstore.move.exchange import Exchange
from kvstore.page import PageKey, page_key
from kvstore.tiers.base import Sweepable

log = logging.getLogger("sglang.kvstore")  # below SGLang's logger, so that its handlers and level apply

FIND_S = 1.0  # in a thread that only SGLang's own prefetch waits for; a request on its way is not held up by it
TOUCH_DEADLINE_S = 30.0
CLEAR_S = 60.0
CLEAR_BATCH = 512  # keys; a few milliseconds in one transaction
MAX_TOUCHED = 1 << 17
_MAX_LOGGED = 10


@dataclass(slots=True)
class BackendCounters:
    """What became of pages; plain growing numbers."""

    found_pages: int = 0
    missing_pages: int = 0
    loaded_pages: int = 0
    lost_pages: int = 0  # asked for, and not had in time or not whole
    stored_pages: int = 0
    unstored_pages: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """A copy for printing."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BackendDeadlines:
    """Longest waits, in seconds."""

    find_s: float
    load_s: float
    save_s: float


class BackendCore:
    """Pages of host pools on an exchange. See the module.

    pools: by name. roots: of the namespace of each pool.
    mark:  what names of pages have beside the hash since weights were updated (`Updates.mark`); None: there are none.
    """

    def __init__(
        self,
        exchange: Exchange,
        pools: Mapping[str, HostPool],
        roots: Mapping[str, bytes],
        deadlines: BackendDeadlines,
        touch_interval_s: float,
        mark: Callable[[], bytes | None] = lambda: b"",
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.exchange = exchange
        self.counters = BackendCounters()
        self._pools = dict(pools)
        self._roots = dict(roots)
        self._most_bytes = max((pool.page_bytes for pool in pools.values()), default=0)
        self._deadlines = deadlines
        self._touch_interval_s = touch_interval_s
        self._mark = mark
        self._now = now
        self._touched: dict[tuple[str, PageKey], float] = {}

    def add_pool(self, name: str, pool: HostPool, root: bytes) -> bool:
        """Take a pool that came later; False if its pages are longer than those that the tiers were opened for."""
        if pool.page_bytes > self._most_bytes:
            return False
        self._roots[name] = root
        self._pools[name] = pool
        return True

    def find(self, pool: str, keys: Sequence[str]) -> list[bool]:
        """Which pages of a pool the tiers have."""
        try:
            names = self._names(pool, keys)
            if names is None:
                return [False] * len(keys)
            found = self.exchange.find(names, deadline=self._now() + self._deadlines.find_s)
        except Exception:
            self._failed("a question was not answered")
            return [False] * len(keys)
        has = [bool(source) for source in found]
        self.counters.found_pages += sum(has)
        self.counters.missing_pages += len(has) - sum(has)
        return has

    def load(self, pool: str, keys: Sequence[str], indices: Any) -> list[bool]:
        """Fill the pages of a pool that have these indices; False where one did not come."""
        try:
            host, names = self._pools[pool], self._names(pool, keys)
            if names is None:
                return [False] * len(keys)
            pieces = host.pieces(indices, len(keys))
            deadline = self._now() + self._deadlines.load_s
            sources = self.exchange.load(names, host.page_bytes, pieces.copy_in, deadline=deadline)
            self._touch(names, sources)
        except Exception:
            self._failed("a load failed, its pages are computed")
            return [False] * len(keys)
        ok = [bool(source) for source in sources]
        self.counters.loaded_pages += sum(ok)
        self.counters.lost_pages += len(ok) - sum(ok)
        self.counters.loaded_bytes += sum(ok) * host.page_bytes
        return ok

    def save(self, pool: str, keys: Sequence[str], indices: Any) -> list[bool]:
        """Store the pages of a pool that have these indices; False where no tier has one."""
        try:
            host, names = self._pools[pool], self._names(pool, keys)
            if names is None:
                return [False] * len(keys)
            pieces = host.pieces(indices, len(keys))
            deadline = self._now() + self._deadlines.save_s
            ok = [bool(one) for one in self.exchange.save(names, host.page_bytes, pieces.copy_out, deadline=deadline)]
        except Exception:
            self._failed("a save failed, its pages are not stored")
            return [False] * len(keys)
        self.counters.stored_pages += sum(ok)
        self.counters.unstored_pages += len(ok) - sum(ok)
        self.counters.stored_bytes += sum(ok) * host.page_bytes
        return ok

    def clear(self) -> None:
        """Delete every page of the directory, and of the namespace on a server that others use too."""
        for name in self.exchange.tiers:
            try:
                tier = self.exchange.tier(name)
                if isinstance(tier, Sweepable):
                    tier.sweep(timeout_s=CLEAR_S)
                    continue
                keys = [page.key for page in tier.scan()]
                for start in range(0, len(keys), CLEAR_BATCH):
                    deadline = self._now() + CLEAR_S
                    self.exchange.delete(name, keys[start : start + CLEAR_BATCH], deadline=deadline)
            except Exception:
                self._failed(f"tier {name} was not cleared")

    def close(self, timeout_s: float) -> int:
        """Finish what is under way and close the tiers; return how many transfers were cut off. Idempotent."""
        return self.exchange.close(timeout_s)

    # ---- private ------------------------------------------------------------------------------------------------

    def _names(self, pool: str, keys: Sequence[str]) -> list[PageKey] | None:
        mark = self._mark()
        if mark is None:
            return None
        root = self._roots[pool] + len(mark).to_bytes(4, "little") + mark
        return [page_key(hashlib.sha256(root + key.encode()).digest()) for key in keys]

    def _touch(self, names: Sequence[PageKey], sources: Sequence[str]) -> None:
        """Tell the tiers what was used, each page at most once per `touch_interval_s`."""
        now = self._now()
        by_tier: dict[str, list[PageKey]] = {}
        # Tail first: a leaf must look older than its parent, so that plain LRU evicts leaves before what they hang on.
        for name, tier in zip(reversed(names), reversed(sources), strict=True):
            if tier and now - self._touched.get((tier, name), float("-inf")) >= self._touch_interval_s:
                self._touched.pop((tier, name), None)
                self._touched[tier, name] = now
                by_tier.setdefault(tier, []).append(name)
        while len(self._touched) > MAX_TOUCHED:
            del self._touched[next(iter(self._touched))]
        for tier, some in by_tier.items():
            self.exchange.touch(tier, some, deadline=now + TOUCH_DEADLINE_S)

    def _failed(self, what: str) -> None:
        self.counters.errors += 1
        if self.counters.errors <= _MAX_LOGGED or self.counters.errors % 1000 == 0:
            log.exception("kvstore backend: %s (%d errors so far)", what, self.counters.errors)
