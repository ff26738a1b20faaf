"""A look into a disk tier's directory, past the code under test."""

from __future__ import annotations

import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from kvstore.page import PageKey
from kvstore.tiers.disk.index import DiskIndex
from kvstore.tiers.disk.record import PageRecord, decode_record
from kvstore.tiers.disk.tier import DiskTier

SLOT_BYTES = 8192


def open_disk(path: Path, pages: int = 8, *, layout: str = "layout", **options: Any) -> DiskTier:
    """A tier with room for `pages` pages of SLOT_BYTES."""
    return DiskTier.open(path, layout, SLOT_BYTES, pages * SLOT_BYTES, **options)


def stored_keys(tier: DiskTier) -> list[PageKey]:
    """The keys of what is stored and unexpired, least recently used first."""
    return [page.key for page in tier.scan()]


def index_of(tier: DiskTier) -> DiskIndex:
    index = tier._directory._index
    assert index is not None
    return index


def raw_record(tier: DiskTier, key: PageKey) -> bytes:
    index = index_of(tier)
    with index._env.begin() as txn:
        raw = txn.get(key, db=index._pages._pages)
    assert raw is not None
    return bytes(raw)


def put_raw_record(tier: DiskTier, key: PageKey, raw: bytes) -> None:
    index = index_of(tier)
    with index._env.begin(write=True) as txn:
        txn.put(key, raw, db=index._pages._pages)


def record_of(tier: DiskTier, key: PageKey) -> PageRecord:
    return decode_record(key, raw_record(tier, key))


def flip_slab_bit(tier: DiskTier, key: PageKey, byte: int, bit: int) -> None:
    """Flip one bit of a stored page in the file."""
    offset = record_of(tier, key).slot * SLOT_BYTES + byte
    fd = os.open(tier._directory.slab.path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1 << bit]), offset)
    finally:
        os.close(fd)


def check_slots(tier: DiskTier) -> None:
    """Every slot below the high water mark is free, being written, or named by one record; order knows every record."""
    index = index_of(tier)
    with index._env.begin() as txn:
        state = index._meta.state(txn)
        records = [decode_record(key, raw) for key, raw in txn.cursor(index._pages._pages)]
        free = [struct.unpack(">I", raw)[0] for raw, _ in txn.cursor(index._slots._free)]
        writing = [struct.unpack(">I", raw)[0] for raw, _ in txn.cursor(index._slots._writing)]
        order = {struct.unpack(">Q", raw)[0]: key for raw, key in txn.cursor(index._pages._order)}
    places = Counter([*free, *writing, *(record.slot for record in records)])
    assert sorted(places) == list(range(state.high_water)), "a slot is lost"
    assert set(places.values()) <= {1}, "a slot is in two places"
    assert state.high_water <= state.num_slots
    assert order == {record.stamp: record.header.key for record in records}
    assert max(order, default=0) <= state.clock
