"""KV events: what came to which tier and what left it, for cache-aware routers and for clients that tell theirs.

The words are those engines use: BlockStored, BlockRemoved, AllBlocksCleared. Stores write them down only while somebody
listens. Routers get them as server-sent events; clients ask for them again and again (messages.Events). Whoever
reads too slowly loses the oldest and is told so: `Dropped`; it should then forget what it knows of this daemon.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.daemon.pending import Pending
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.protocol import messages
from kvstore.service.protocol.events import encode_event, encode_events
from kvstore.service.protocol.frames import encode_json

MAX_QUEUED_BYTES = 8 << 20  # of a listener
MAX_ANSWER_BYTES = 1 << 20
POLL_S = 0.05  # news are collected this often: routers need them soon, not at once


class Form(NamedTuple):
    """How a listener is told.

    event: one event as pieces of bytes. dropped: that so many pieces were lost. together: pieces as they are sent.
    """

    event: Callable[[OpenStore, BlockEvent], list[bytes]]
    dropped: Callable[[int], bytes]
    together: Callable[[list[bytes]], bytes]


class EventStream:
    """One listener's queue.

    wants: whether it listens to a store. form: how it is told.
    """

    def __init__(self, wants: Callable[[OpenStore], bool], form: Form) -> None:
        self.wants = wants
        self.form = form
        self._queue: deque[bytes] = deque()
        self._num_bytes = 0
        self._dropped = 0
        self._ready = asyncio.Event()

    def put(self, piece: bytes) -> None:
        """Queue an event, or a piece of one."""
        self._queue.append(piece)
        self._num_bytes += len(piece)
        while self._num_bytes > MAX_QUEUED_BYTES:
            self._num_bytes -= len(self._queue.popleft())
            self._dropped += 1
        self._ready.set()

    def drain(self, max_bytes: int = MAX_QUEUED_BYTES) -> bytes:
        """The queued events, oldest first, and that some was lost before; nothing if there is none."""
        pieces = [self.form.dropped(self._dropped)] if self._dropped else []
        self._dropped = num_bytes = 0
        while self._queue and num_bytes + len(self._queue[0]) <= max_bytes:
            pieces.append(self._queue.popleft())
            num_bytes += len(pieces[-1])
        self._num_bytes -= num_bytes
        if not self._queue:
            self._ready.clear()
        return self.form.together(pieces) if pieces else b""

    async def take(self, timeout_s: float) -> bytes:
        """The queued events, as bytes to be sent; a comment that keeps the connection alive after `timeout_s`."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except asyncio.TimeoutError:
            return b": still here\n\n"
        return self.drain()


class EventHub:
    """Takes the news of the stores and hands them to the streams."""

    def __init__(self, stores: Callable[[], list[OpenStore]]) -> None:
        self._stores = stores
        self._streams: set[EventStream] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_streams(self) -> int:
        """Listeners to server-sent events."""
        return sum(stream.form is SENT for stream in self._streams)

    def listen(self, wants: Callable[[OpenStore], bool], form: Form | None = None) -> EventStream:
        """A stream of the events of the stores that `wants` says yes to, from now on; None: as server-sent events."""
        stream = EventStream(wants, form or SENT)
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
        """Stop collecting, and let nobody wait any longer. Idempotent."""
        for stream in self._streams:
            stream.put(b"")
        self._streams.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _note(self) -> None:
        for opened in self._stores():
            is_wanted = any(stream.wants(opened) for stream in self._streams)
            if is_wanted and not opened.journal.wants_events:
                opened.store.take_events()  # what a listener before left there: much may have happened since
            opened.journal.wants_events = is_wanted

    async def _collect(self) -> None:
        while self._streams:
            await asyncio.sleep(POLL_S)
            self._note()  # stores opened since
            for opened in self._stores():
                events = opened.store.take_events()
                listeners = [stream for stream in self._streams if stream.wants(opened)]
                if not events or not listeners:
                    continue
                for form in {stream.form for stream in listeners}:
                    pieces = [piece for event in events for piece in form.event(opened, event)]
                    for stream in listeners:
                        if stream.form is form:
                            for piece in pieces:
                                stream.put(piece)
                opened.watch.wake()  # clients whose answer is pending
        self._task = None


class Feed:
    """The events of one client's store, from `listen` or its first question on."""

    def __init__(self, hub: EventHub, opened: OpenStore) -> None:
        self._hub = hub
        self._opened = opened
        self._stream: EventStream | None = None
        self._num_asked = 0

    def listen(self) -> EventStream:
        """Note events for the client from now on. Idempotent."""
        if self._stream is None:
            self._stream = self._hub.listen(lambda opened: opened is self._opened, ASKED)
        return self._stream

    def answer(self, call: messages.EventsCall) -> bytes | Pending:
        """The new events; waits for them as long as the client says, and gives nothing then."""
        stream = self.listen()
        self._num_asked = number = self._num_asked + 1

        def look() -> bytes | None:
            # A client that lost its connection asks again: what came since must not go where nobody reads.
            return stream.drain(MAX_ANSWER_BYTES) or None if number == self._num_asked else b""

        return look() or Pending(look, lambda: b"", call.timeout_s)

    def close(self) -> None:
        """The client is gone. Idempotent."""
        if self._stream is not None:
            self._hub.leave(self._stream)


def encode(opened: OpenStore, event: BlockEvent) -> bytes:
    """One server-sent event."""
    data: dict[str, Any] = {"namespace": opened.id, "at": event.at}
    if event.event in (Event.STORED, Event.REMOVED):
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


SENT = Form(
    lambda opened, event: [encode(opened, event)],
    lambda num_dropped: _line(Event.DROPPED.value, {"events": num_dropped}),
    b"".join,
)
ASKED = Form(
    lambda opened, event: encode_event(event),
    lambda num_dropped: encode_event(BlockEvent(Event.DROPPED, time.time()))[0],
    encode_events,
)
