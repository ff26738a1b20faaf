from __future__ import annotations

import asyncio

from kvstore.llamacpp.slots import NOTHING, LlamaSlots
from tests.helpers.llama_front import WAIT_S, until


async def test_a_request_that_is_cancelled_as_it_gets_its_turn_passes_it_on() -> None:
    slots = LlamaSlots(1)
    held = await slots.take(NOTHING, "", 0, 16)
    first = asyncio.ensure_future(slots.take(NOTHING, "", 0, 16))
    await until(lambda: slots.num_waiting == 1)
    second = asyncio.ensure_future(slots.take(NOTHING, "", 0, 16))
    await until(lambda: slots.num_waiting == 2)

    await slots.give(held)
    first.cancel()

    assert await asyncio.wait_for(second, WAIT_S) is held
    assert first.cancelled()
