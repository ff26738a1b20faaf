from __future__ import annotations

import asyncio

import pytest

from eviction.registry import make_policy
from kvstore.aio import AsyncStore
from kvstore.plan.tier_plan import TierPlan
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.stores import LAYOUT, open_small, prompt, save, store_over, use
from tests.helpers.waiting import WAIT_S


async def test_lookup_load_flush_and_close_are_awaited() -> None:
    store = open_small()
    use(store, prompt(4))
    face = AsyncStore(store)
    request = store.request(prompt(4))

    match = await face.lookup(request)
    lease, status = await face.load(request, match.num_blocks)
    store.complete(lease)

    assert (match.num_blocks, status.num_blocks) == (4, 4)
    assert await face.flush(WAIT_S)
    await face.close()


async def test_a_cancelled_load_holds_nothing() -> None:
    tier = FaultyTier(MemoryTier(64, LAYOUT.slot_bytes))
    plan = TierPlan("memory", 64, make_policy("lru"), is_indexed=True, is_shared=False)
    with store_over([(tier, plan)], num_slots=4) as store:
        use(store, prompt(4, seed=1))
        store.flush(WAIT_S)
        use(store, prompt(4, seed=2))
        store.flush(WAIT_S)
        tier.hang()
        request = store.request(prompt(4, seed=1))

        task = asyncio.create_task(AsyncStore(store).load(request, 4, timeout_s=30.0))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.stats()["leases"] == 0

        tier.recover()
        save(store, store.request(prompt(1, seed=3)))  # wakes the thread that still waits for the released lease
        store.flush(WAIT_S)
        store.check()
