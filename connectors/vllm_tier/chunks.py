"""The name of a chunk of vLLM's offloading in our tiers, its time to live there, and its uses.

A chunk is vLLM's unit: the blocks of one layer group, one row of its host memory. One thread, the scheduler's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.move.rows import RowMover
from kvstore.page import PageKey, PageMeta, page_key

TOUCH_BATCH = 512  # keys; a few milliseconds in one transaction
TOUCH_DEADLINE_S = 30.0
GROUP_BYTES = 4  # vLLM's key is the block hash and the number of the layer group, big endian


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The configuration of the tier.

    root:            of the namespace; chunks of another model, layout or machine have other names.
    batch_pages:     chunks per call of a lane, at most.
    max_saving_rows: rows that saves may hold at once; what is beyond is skipped, since these rows are not there for
                     anything else meanwhile.
    ttl_s:           by tier: a chunk unused for so long is dropped; 0 means never.
    """

    root: bytes
    batch_pages: int
    max_saving_rows: int
    lookup_deadline_s: float
    load_deadline_s: float
    touch_interval_s: float
    ttl_s: Mapping[str, float]


class Chunks:
    """Names and metadata of chunks.

    wall: Unix seconds, for times to live.
    """

    def __init__(self, settings: TierSettings, row_bytes: int, wall: Callable[[], float] = time.time) -> None:
        self._root = settings.root
        self._ttl_s = settings.ttl_s
        self._row_bytes = row_bytes
        self._wall = wall

    def name(self, key: bytes) -> PageKey:
        """The name in our tiers of vLLM's key."""
        block, group = key[:-GROUP_BYTES], int.from_bytes(key[-GROUP_BYTES:], "big")
        return page_key(hashlib.sha256(self._root + block).digest(), group)

    def metas(self, tier: str, count: int) -> list[PageMeta]:
        """Of `count` chunks that a tier gets now."""
        return [PageMeta(self._row_bytes, expires_at=self.expires_at(tier))] * count

    def expires_at(self, tier: str) -> float:
        """When what is used now leaves a tier, in Unix seconds; 0 means never."""
        ttl_s = self._ttl_s.get(tier, 0.0)
        return self._wall() + ttl_s if ttl_s else 0.0


class Touches:
    """Chunks that were used, to be told to the tiers: in batches, and each at most once per `touch_interval_s`."""

    def __init__(self, mover: RowMover, chunks: Chunks, interval_s: float, now: Callable[[], float]) -> None:
        self._mover = mover
        self._chunks = chunks
        self._interval_s = interval_s
        self._now = now
        self._touched: dict[tuple[str, bytes], float] = {}  # when; the oldest first
        self._waiting: dict[str, dict[bytes, None]] = {tier: {} for tier in mover.tiers}

    def later(self, tier: str, keys: Sequence[bytes]) -> None:
        """Note chunks, the most recently used last."""
        now = self._now()
        for key in keys:
            if now - self._touched.get((tier, key), -1e9) >= self._interval_s:
                self._touched.pop((tier, key), None)
                self._touched[tier, key] = now
                self._waiting[tier][key] = None
        while self._touched and now - next(iter(self._touched.values())) >= self._interval_s:
            del self._touched[next(iter(self._touched))]

    def send(self) -> None:
        """Tell the tiers that are up; for the others it is too late."""
        deadline = self._now() + TOUCH_DEADLINE_S
        for tier, waiting in self._waiting.items():
            keys = list(waiting) if self._mover.is_up(tier) else []
            waiting.clear()
            for start in range(0, len(keys), TOUCH_BATCH):
                names = [self._chunks.name(key) for key in keys[start : start + TOUCH_BATCH]]
                self._mover.touch(tier, names, expires_at=self._chunks.expires_at(tier), deadline=deadline)
