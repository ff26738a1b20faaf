"""A front before a llama-server that computes nothing, and a client that waits until it has stored what it wants to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from kvstore.config.sections import Config
from kvstore.llamacpp.front import FrontSettings, LlamaFront
from kvstore.llamacpp.seat import LlamaSeat
from kvstore.llamacpp.server import LlamaServer
from tests.helpers.llama_server import FakeLlama

BLOCK = 16
HEAD = "".join(chr(97 + i * i % 26) for i in range(10 * BLOCK))
WAIT_S = 20.0


class Client:
    """Asks a front, and waits until it has stored what it wants to store."""

    def __init__(self, front: LlamaFront, session: aiohttp.ClientSession) -> None:
        self.front = front
        self._session = session

    async def post(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        async with self._session.post(self.front.site.url + path, json=body) as answer:
            found = await answer.json()
            await self.settle()
            return answer.status, found

    async def ask(self, prompt: str, **body: Any) -> dict[str, Any]:
        """The answer to a prompt, which has to be one."""
        status, found = await self.post(prompt=prompt, **body)
        assert status == 200, found
        return found

    async def get(self, path: str) -> Any:
        async with self._session.get(self.front.site.url + path) as answer:
            return await answer.json()

    async def text(self, path: str) -> str:
        async with self._session.get(self.front.site.url + path) as answer:
            return await answer.text()

    async def settle(self) -> None:
        slots = self.front.seat.served.slots
        await until(lambda: slots.num_free == len(slots.slots))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S) if hasattr(asyncio, "timeout") else _no_timeout():
        while not holds():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def _no_timeout() -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def fronted(llama: FakeLlama, **sections: Any) -> AsyncIterator[Client]:
    host = {"capacity_bytes": 1 << 20, "huge_pages": False}
    config = Config(**{"store": {"block_size": BLOCK}, "host": host, **sections})
    front = LlamaFront(
        FrontSettings(port=0), LlamaSeat(LlamaServer(llama.url, llama.folder), config, weights="sampled")
    )
    try:
        await front.open()
        async with aiohttp.ClientSession() as session:
            yield Client(front, session)
    finally:
        await front.close()


async def forget_slots(llama: FakeLlama, client: Client) -> None:
    """Its slots are empty, as after a restart, and the front knows."""
    llama.slots = [[] for _ in llama.slots]
    for slot in client.front.seat.served.slots.slots:
        slot.spoil()


async def started_anew(llama: FakeLlama, **changes: Any) -> FakeLlama:
    """Another process at the address of a server, with these attributes."""
    port = int(llama.url.rpartition(":")[2])
    await llama.stop()
    other = FakeLlama(llama.folder)
    for name, value in changes.items():
        setattr(other, name, value)
    return await other.start(port)
