"""The reference tier keeps the tier contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from kvstore.errors import ConfigError
from kvstore.page import PageKey
from kvstore.testing.contracts.tier import TierContract
from kvstore.testing.pages import FakeClock, keys_of, store
from kvstore.tiers.base import Tier
from kvstore.tiers.memory import MemoryTier


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self, clock: FakeClock) -> Iterator[Tier]:
        with closing(MemoryTier(self.capacity, self.slot_bytes, now=clock)) as tier:
            yield tier

    def regions(self, tier: Tier, key: PageKey) -> dict[str, int]:
        assert isinstance(tier, MemoryTier)
        copy = tier._copies[key]
        return {"header": len(copy.header), "tokens": len(copy.tokens), "data": len(copy.data)}

    def flip_bit(self, tier: Tier, key: PageKey, region: str, byte: int, bit: int) -> None:
        assert isinstance(tier, MemoryTier)
        copy = tier._copies[key]
        if region == "data":
            copy.data[byte] ^= 1 << bit
        else:
            stored = bytearray(getattr(copy, region))
            stored[byte] ^= 1 << bit
            setattr(copy, region, bytes(stored))


def test_a_full_tier_refuses_what_nothing_made_room_for() -> None:
    tier = MemoryTier(2, 4096)

    assert store(tier, keys_of("page", 3), 4096) == [True, True, False]
    assert len(tier) == 2


def test_a_tier_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.capacity_pages is 0"):
        MemoryTier(0, 4096)
    with pytest.raises(ConfigError, match=r"memory\.slot_bytes is 0"):
        MemoryTier(1, 0)
