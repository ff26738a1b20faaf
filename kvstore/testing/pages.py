"""Pages for tests: keys, bytes that follow from the key, and page-aligned slots to hold them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence

import numpy as np

from kvstore.page import PageKey, PageMeta, page_key
from kvstore.tiers.base import Tier

TIMEOUT_S = 30.0


class FakeClock:
    """A clock that moves only when told; call it for the Unix time in seconds."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def key_of(name: object, group: int = 0, shard: int = 0) -> PageKey:
    """The key of the block called `name`."""
    return page_key(hashlib.sha256(repr(name).encode()).digest(), group, shard)


def keys_of(prefix: str, count: int) -> list[PageKey]:
    return [key_of((prefix, index)) for index in range(count)]


def payload(key: PageKey, num_bytes: int, version: int = 0) -> bytes:
    """Random-looking bytes that only this key (and version) has."""
    seed = int.from_bytes(hashlib.sha256(key + bytes([version])).digest()[:8], "little")
    return np.random.default_rng(seed).bytes(num_bytes)


def slots(count: int, slot_bytes: int) -> list[memoryview]:
    """Writable views aligned to 4096 bytes, as a host slab would give."""
    arena = memoryview(mmap.mmap(-1, count * slot_bytes))
    return [arena[i * slot_bytes : (i + 1) * slot_bytes] for i in range(count)]


def filled(
    keys: Sequence[PageKey], slot_bytes: int, num_bytes: int | None = None, version: int = 0
) -> list[memoryview]:
    """A slot for each key, holding its payload."""
    views = slots(len(keys), slot_bytes)
    for key, view in zip(keys, views, strict=True):
        data = payload(key, slot_bytes if num_bytes is None else num_bytes, version)
        view[: len(data)] = data
    return views


def store(
    tier: Tier,
    keys: Sequence[PageKey],
    slot_bytes: int,
    *,
    meta: PageMeta | None = None,
    version: int = 0,
    evict: Sequence[PageKey] = (),
) -> list[bool]:
    """Write the payloads of `keys`."""
    meta = meta or PageMeta(slot_bytes)
    views = filled(keys, slot_bytes, meta.num_bytes, version)
    return tier.write_from(keys, views, [meta] * len(keys), evict=evict, timeout_s=TIMEOUT_S)


def fetch(tier: Tier, keys: Sequence[PageKey], slot_bytes: int, *, meta: PageMeta | None = None) -> list[bytes | None]:
    """Read pages: their bytes, or None for a miss."""
    meta = meta or PageMeta(slot_bytes)
    views = slots(len(keys), slot_bytes)
    found = tier.read_into(keys, views, [meta] * len(keys), timeout_s=TIMEOUT_S)
    return [bytes(view[: meta.num_bytes]) if ok else None for ok, view in zip(found, views, strict=True)]
