"""A tier that fails on command, a slab of slots, and a clock that moves only when told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvstore.testing.pages import FakeClock, slots
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.lanes import NUM_SLOTS, SLOT_BYTES, Recorder, Transfers
from tests.helpers.waiting import WAIT_S


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def tier() -> Iterator[FaultyTier]:
    tier = FaultyTier(MemoryTier(256, SLOT_BYTES))
    yield tier
    tier.recover()


@pytest.fixture
def slab() -> list[memoryview]:
    return slots(NUM_SLOTS, SLOT_BYTES)


@pytest.fixture
def slot_view(slab: list[memoryview]) -> Callable[[int], memoryview]:
    return slab.__getitem__


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make(tier: FaultyTier) -> Transfers:
    return Transfers(tier.name)


@pytest.fixture(autouse=True)
def no_thread_is_left(tier: FaultyTier) -> Iterator[None]:
    yield
    tier.recover()
    for thread in threading.enumerate():
        if thread.name.startswith("kvstore-"):
            thread.join(WAIT_S)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kvstore-")]
