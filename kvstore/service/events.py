"""KV events for cache-aware routers: what came to which tier and what left it, as server-sent events.

The words are those engines use: BlockStored, BlockRemoved, AllBlocksCleared. Stores write them down only while somebody
listens. A listener that reads too slowly loses the oldest events and is told how many: `Dropped`; it should then forget
what it knows of this daemon.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.protocol import encode_json
from kvstore.service.stores import OpenStore

MAX_QUEUED = 16_384
POLL_S = 0.05  # news are collected this often: routers need them soon, not at once


class EventStream:
    """One listener's queue."""

    def __init__(self, wants: Callable[[OpenStore], bool]) -> None:
        self.wants = wants
        self._queue: deque[bytes] = deque()
        self._dropped = 0
        self._ready = asyncio.Event()

    def put(self, line: bytes) -> None:
        """Queue an event."""
        if len(self._queue) >= MAX_QUEUED:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(line)
        self._ready.set()

    async def take(self, timeout_s: float) -> bytes:
        """What is queued, as bytes to be sent; a comment that keeps the connection alive after `timeout_s`."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except asyncio.TimeoutError:
            return b": still here\n\n"
        self._ready.clear()
        lines = list(self._queue)
        self._queue.clear()
        if self._dropped:
            lines.insert(0, _line("Dropped", {"events": self._dropped}))
            self._dropped = 0
        return b"".join(lines)


class EventHub:
    """Takes the news of the stores and hands them to the streams."""

    def __init__(self, stores: Callable[[], list[OpenStore]]) -> None:
        self._stores = stores
        self._streams: set[EventStream] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        """Listeners."""
        return len(self._streams)

    def listen(self, wants: Callable[[OpenStore], bool]) -> EventStream:
        """A stream of the events of the stores that `wants` says yes to, from now on."""
        stream = EventStream(wants)
        self._streams.add(stream)
        self._note()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._collect())
        return stream

    def leave(self, stream: EventStream) -> None:
        """The listener is gone. Idempotent."""
        self._streams.discard(stream)
        self._note()

    async def close(self) -> None:
        """Stop collecting. Idempotent."""
        self._streams.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _note(self) -> None:
        for opened in self._stores():
            opened.journal.wants_events = any(stream.wants(opened) for stream in self._streams)

    async def _collect(self) -> None:
        while self._streams:
            await asyncio.sleep(POLL_S)
            self._note()  # stores opened since
            for opened in self._stores():
                events = opened.store.take_events()
                listeners = [stream for stream in self._streams if stream.wants(opened)]
                if not events or not listeners:
                    continue
                lines = [encode(opened, event) for event in events]
                for stream in listeners:
                    for line in lines:
                        stream.put(line)
        self._task = None


def encode(opened: OpenStore, event: BlockEvent) -> bytes:
    """One server-sent event."""
    data: dict[str, Any] = {"namespace": opened.id, "at": event.at}
    if event.event is not Event.CLEARED:
        data |= {
            "medium": event.tier,
            "group": event.group,
            "block_size": opened.layout.block_size,
            "block_hashes": [key.hex() for key in event.keys],
        }
    if event.event is Event.STORED:
        data["parent_block_hashes"] = [None if key is None else key.hex() for key in event.parents]
    return _line(event.event.value, data)


def _line(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode_json(data) + b"\n\n"
