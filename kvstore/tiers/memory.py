"""The reference tier: a dict, a lock, and the dumbest right thing.

It stands in for a medium in tests and simulations and shows what the contract in `base.py` means: header and bytes are
stored together and verified on the way out exactly as on disk. A full tier refuses what its `evict` made no room for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError, CorruptPage, TierUnavailable
from kvstore.forks import forbid, harmless
from kvstore.page import PageKey, PageMeta, decode_header, encode_header, verify_page
from kvstore.tiers.base import StoredPage, TierCounters


@dataclass(slots=True)
class _Copy:
    """One stored page; a touch replaces `expires_at`, the header keeps what was written."""

    header: bytes
    tokens: bytes
    data: npt.NDArray[np.uint8]
    meta: PageMeta
    expires_at: float


class MemoryTier:
    """Pages in a dict, least recently used first. Any thread: one lock around every call."""

    def __init__(
        self, capacity_pages: int, slot_bytes: int, *, name: str = "memory", now: Callable[[], float] = time.time
    ) -> None:
        """Make a tier of `capacity_pages` pages of at most `slot_bytes`. `now` gives Unix seconds."""
        if capacity_pages < 1:
            raise ConfigError(f"memory.capacity_pages is {capacity_pages}; it must be at least 1")
        if slot_bytes < 1:
            raise ConfigError(f"memory.slot_bytes is {slot_bytes}; it must be at least 1")
        self.name = name
        self.counters = TierCounters()
        self._capacity = capacity_pages
        self.slot_bytes = slot_bytes
        self._now = now
        self._lock = threading.Lock()
        self._copies: dict[PageKey, _Copy] = {}
        self._is_closed = False
        forbid(self)

    @property
    def capacity_pages(self) -> int | None:
        """Pages that fit."""
        return self._capacity

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """Which keys are there, unexpired."""
        with self._lock:
            self._check_open()
            return [self._live(key) is not None for key in keys]

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """Fill `views[i]` with the verified page of `keys[i]`; False where there is none."""
        with self._lock:
            self._check_open()
            return [self._read(key, view, meta) for key, view, meta in zip(keys, views, metas, strict=True)]

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        """Drop `evict`, then store pages while there is room; a key that is there keeps its bytes."""
        with self._lock:
            self._check_open()
            for key in evict:
                self._copies.pop(key, None)
            return [self._write(key, view, meta) for key, view, meta in zip(keys, views, metas, strict=True)]

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """Make keys the most recent ones, in this order, and move their deadline if `expires_at` is not 0."""
        with self._lock:
            self._check_open()
            return [self._touch(key, expires_at) for key in keys]

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """Forget pages; unknown keys are ignored."""
        with self._lock:
            self._check_open()
            for key in keys:
                self._copies.pop(key, None)

    def scan(self) -> Iterator[StoredPage]:
        """Yield what was stored and unexpired when the scan began, least recently used first."""
        with self._lock:
            self._check_open()
            pages = [
                StoredPage(
                    key,
                    PageMeta(copy.meta.num_bytes, copy.meta.parent, copy.meta.depth, copy.expires_at, copy.tokens),
                )
                for key, copy in self._copies.items()
                if not self._is_expired(copy)
            ]
        return iter(pages)

    def ping(self, *, timeout_s: float) -> None:
        """Raise TierUnavailable once closed."""
        self._check_open()

    @harmless
    def close(self) -> None:
        """Forget everything. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailable(f"{self.name} tier: used after close")

    def _is_expired(self, copy: _Copy) -> bool:
        return 0 < copy.expires_at <= self._now()

    def _live(self, key: PageKey) -> _Copy | None:
        copy = self._copies.get(key)
        return None if copy is None or self._is_expired(copy) else copy

    def _read(self, key: PageKey, view: memoryview, meta: PageMeta) -> bool:
        copy = self._copies.get(key)
        if copy is None:
            return False
        if self._is_expired(copy):
            self.counters.expired_pages += 1
            del self._copies[key]
            return False
        if not _is_whole(key, copy, meta.num_bytes):
            self.counters.corrupt_pages += 1
            del self._copies[key]
            return False
        if meta.tokens and meta.tokens != copy.tokens:
            self.counters.collisions += 1
            return False
        np.copyto(np.frombuffer(view, np.uint8, meta.num_bytes), copy.data)
        return True

    def _write(self, key: PageKey, view: memoryview, meta: PageMeta) -> bool:
        if self._live(key) is not None:
            return True
        self._copies.pop(key, None)
        if len(self._copies) >= self._capacity:
            return False
        data = np.frombuffer(view, np.uint8, meta.num_bytes).copy()
        header = encode_header(key, meta, memoryview(data), created_at=self._now())
        self._copies[key] = _Copy(header, meta.tokens, data, meta, meta.expires_at)
        return True

    def _touch(self, key: PageKey, expires_at: float) -> bool:
        copy = self._live(key)
        if copy is None:
            return False
        self._copies[key] = self._copies.pop(key)
        copy.expires_at = expires_at or copy.expires_at
        return True


def _is_whole(key: PageKey, copy: _Copy, num_bytes: int) -> bool:
    try:
        header = decode_header(copy.header)
    except CorruptPage:
        return False
    return (
        header.key == key
        and header.raw_bytes == header.stored_bytes == num_bytes == len(copy.data)
        and header.token_bytes == len(copy.tokens)
        and verify_page(copy.header, header, copy.tokens, copy.data.data)
    )
