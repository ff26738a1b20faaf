"""A check around a tier that does not verify what it reads (`TierTraits.is_verified`).

The checksum of every page that this process wrote is kept in memory, 8 bytes and the key, and what is read must fit it:
never a wrong page, at the price that pages of an earlier process, or of another, are misses. It is seeded with key and
tokens, so that a page in the wrong place fails like one with a flipped bit.

Thread rule as the tier's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import xxhash

from kvstore.forks import in_child
from kvstore.page import PageKey, PageMeta
from kvstore.tiers.base import StoredPage, Tier

MAX_SUMS = 1 << 20  # pages of a tier without a capacity; some 100 MB. The oldest are misses then


class CheckedTier:
    """A tier, and the checksums of what was written to it. What is not told here is the tier's own."""

    def __init__(self, tier: Tier) -> None:
        self.name = tier.name
        self.counters = tier.counters
        self._tier = tier
        self._most = tier.capacity_pages or MAX_SUMS
        self._sums: dict[PageKey, int] = {}
        self._lock = threading.Lock()
        in_child(self, CheckedTier._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()  # in a forked child: another thread of the parent may have held it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)  # claims, sweeps and probes, where the tier has them

    @property
    def capacity_pages(self) -> int | None:
        """As the tier's."""
        return self._tier.capacity_pages

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """Which keys are there, and could be checked."""
        there = self._tier.contains(keys, timeout_s=timeout_s)
        return [found and key in self._sums for key, found in zip(keys, there, strict=True)]

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """Fill `views[i]` with the page of `keys[i]`; a page that does not fit its checksum is dropped and counted."""
        sums = [self._sums.get(key) for key in keys]
        known = [i for i, kept in enumerate(sums) if kept is not None]
        read = self._tier.read_into(
            [keys[i] for i in known], [views[i] for i in known], [metas[i] for i in known], timeout_s=timeout_s
        )
        ok = [False] * len(keys)
        corrupt = []
        for i, found in zip(known, read, strict=True):
            ok[i] = found and _sum(keys[i], views[i], metas[i]) == sums[i]
            if found and not ok[i]:
                corrupt.append(keys[i])
        if corrupt:
            self.counters.corrupt_pages += len(corrupt)
            self.delete(corrupt, timeout_s=timeout_s)
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
        """Store pages, and keep the checksums of those that are stored."""
        self._forget(evict)
        sums = [_sum(key, view, meta) for key, view, meta in zip(keys, views, metas, strict=True)]
        ok = self._tier.write_from(keys, views, metas, evict=evict, timeout_s=timeout_s)
        with self._lock:
            for key, kept, is_stored in zip(keys, sums, ok, strict=True):
                if is_stored:
                    # The first writer's bytes stay, and so does what is known of them.
                    self._sums.setdefault(key, kept)
            for key in list(islice(self._sums, max(0, len(self._sums) - self._most))):
                del self._sums[key]
        return ok

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """As the tier's."""
        return self._tier.touch(keys, expires_at=expires_at, timeout_s=timeout_s)

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """Forget pages and their checksums."""
        self._forget(keys)
        self._tier.delete(keys, timeout_s=timeout_s)

    def scan(self) -> Iterator[StoredPage]:
        """Yield the pages that can be checked."""
        return (page for page in self._tier.scan() if page.key in self._sums)

    def ping(self, *, timeout_s: float) -> None:
        """As the tier's."""
        self._tier.ping(timeout_s=timeout_s)

    def close(self) -> None:
        """As the tier's."""
        self._tier.close()

    def _forget(self, keys: Sequence[PageKey]) -> None:
        with self._lock:
            for key in keys:
                self._sums.pop(key, None)


def _sum(key: PageKey, view: memoryview, meta: PageMeta) -> int:
    seed = xxhash.xxh3_64_intdigest(bytes(key) + meta.tokens)
    return xxhash.xxh3_64_intdigest(view[: meta.num_bytes], seed=seed)
