"""The disk tier keeps the tier contract, with and without O_DIRECT."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.page import PageKey
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from tests.contracts.tier import TierContract
from tests.helpers.pages import FakeClock


def raw_record(tier: DiskTier, key: PageKey) -> bytes:
    """The index record of a page, past the code under test."""
    with tier._directory.use() as index, index._env.begin() as txn:
        raw: bytes = txn.get(key, db=index._pages)
        return raw


class TestDiskTier(TierContract):
    direct = True

    @pytest.fixture
    def tier(self, clock: FakeClock, tmp_path: Path) -> Iterator[Tier]:
        with closing(
            DiskTier.open(
                tmp_path, "layout", self.slot_bytes, self.capacity * self.slot_bytes, direct=self.direct, now=clock
            )
        ) as tier:
            yield tier

    def regions(self, tier: Tier, key: PageKey) -> dict[str, int]:
        assert isinstance(tier, DiskTier)
        record = tier._directory._index.find([key]).records[0]
        return {"record": len(raw_record(tier, key)), "slab": record.header.stored_bytes}

    def flip_bit(self, tier: Tier, key: PageKey, region: str, byte: int, bit: int) -> None:
        assert isinstance(tier, DiskTier)
        index = tier._directory._index
        if region == "record":
            raw = bytearray(raw_record(tier, key))
            raw[byte] ^= 1 << bit
            with index._env.begin(write=True) as txn:
                txn.put(key, bytes(raw), db=index._pages)
        else:
            offset = index.find([key]).records[0].slot * self.slot_bytes + byte
            fd = os.open(tier._directory.slab.path, os.O_RDWR)
            os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1 << bit]), offset)
            os.close(fd)


class TestDiskTierThroughThePageCache(TestDiskTier):
    direct = False
