"""The name of a chunk of vLLM's offloading in our tiers, its time to live there, and its uses.

A chunk is vLLM's unit: the blocks of one layer group, one row of its host memory. One thread, the scheduler's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.hints.limits import HintLimits
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
    num_groups, chunk_tokens: layer groups of a block, and tokens of a chunk.
    hints:           bounds on KV hints.
    """

    root: bytes
    batch_pages: int
    max_saving_rows: int
    lookup_deadline_s: float
    load_deadline_s: float
    touch_interval_s: float
    ttl_s: Mapping[str, float]
    num_groups: int = 1
    chunk_tokens: int = 1
    hints: HintLimits = field(default_factory=HintLimits)


class _Retained(NamedTuple):
    """until: Unix time. told_at: when the tiers were last told that it is used, by the steady clock."""

    until: float
    told_at: float


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
    """Chunks that were used, to be told to the tiers: in batches, and each at most once per `touch_interval_s`.

    Retained chunks are told as used once in that time until their own ends, so that they are evicted last, and they
    live until then at least.

    wall: Unix seconds.
    """

    def __init__(
        self,
        mover: RowMover,
        chunks: Chunks,
        interval_s: float,
        now: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._mover = mover
        self._chunks = chunks
        self._interval_s = interval_s
        self._now = now
        self._wall = wall
        self._retained: dict[bytes, _Retained] = {}  # in the order in which they are due
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

    def retain(self, keys: Sequence[bytes], until: float, most: int) -> int:
        """Retain chunks until a Unix time, as long as no more than `most` are; returns how many of `keys` are now."""
        num_retained, now = 0, self._now()
        for key in keys:
            known = self._retained.pop(key, None)
            if known is None and len(self._retained) >= most:
                continue
            self._retained[key] = _Retained(max(until, known.until if known else 0.0), now)
            for waiting in self._waiting.values():
                waiting[key] = None
            num_retained += 1
        return num_retained

    def release(self, keys: Sequence[bytes]) -> None:
        """Retain chunks no longer."""
        for key in keys:
            self._retained.pop(key, None)

    def again(self) -> None:
        """Note retained chunks that are due as used; a batch of them, for it is called in every step."""
        now, wall = self._now(), self._wall()
        due: list[bytes] = []
        for key, one in self._retained.items():
            if len(due) == TOUCH_BATCH or now - one.told_at < self._interval_s:
                break
            due.append(key)
        for key in due:
            one = self._retained.pop(key)  # to the end: the next one to be due is the first
            if one.until > wall:
                self._retained[key] = _Retained(one.until, now)
        alive = [key for key in due if key in self._retained]
        for tier in self._mover.tiers if alive else ():
            for key in alive:
                self._waiting[tier][key] = None

    @property
    def num_retained(self) -> int:
        """Chunks that are retained."""
        return len(self._retained)

    def send(self) -> None:
        """Tell the tiers that are up; for the others it is too late."""
        deadline = self._now() + TOUCH_DEADLINE_S
        for tier, waiting in self._waiting.items():
            keys = list(waiting) if self._mover.is_up(tier) else []
            waiting.clear()
            for expires_at, some in self._by_end(tier, keys).items():
                for start in range(0, len(some), TOUCH_BATCH):
                    names = [self._chunks.name(key) for key in some[start : start + TOUCH_BATCH]]
                    self._mover.touch(tier, names, expires_at=expires_at, deadline=deadline)

    def _by_end(self, tier: str, keys: Sequence[bytes]) -> dict[float, list[bytes]]:
        """Chunks by when they leave a tier unless they are used again."""
        usual = self._chunks.expires_at(tier)
        found: dict[float, list[bytes]] = {}
        for key in keys:
            retained = self._retained.get(key)
            is_longer = usual and retained is not None and retained.until > usual
            found.setdefault(retained.until if is_longer and retained else usual, []).append(key)
        return found
