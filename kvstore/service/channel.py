"""One connection of a client, in the daemon's event loop.

It cuts what arrives into frames, hands them to the session one at a time, and writes the answers. While an answer is
pending it reads no further, so a client cannot pile up work. Whatever is no frame of this protocol is told once and
ends the connection, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any, Protocol, cast

from kvstore.errors import KVStoreError
from kvstore.service import protocol
from kvstore.service.protocol import HEADER, Frame, Op, ProtocolError, Status
from kvstore.service.session import Pending, Resend, Session
from kvstore.service.tenants import Tenant

log = logging.getLogger(__name__)

BUFFER_BYTES = 64 << 10  # the keys of 2000 blocks; a message that is longer gets a buffer of its own
HELLO_TIMEOUT_S = 5.0  # a connection that says nothing is closed


class Host(Protocol):
    """What a channel needs of its daemon."""

    async def hello(self, channel: Channel, message: dict[str, Any]) -> Greeting:
        """Open a session for a client. Raises KVStoreError."""

    def attach(self, channel: Channel, message: dict[str, Any]) -> Session | None:
        """The session that a further connection belongs to; None if it is gone."""

    def lost(self, channel: Channel) -> None:
        """The connection is closed."""


class Greeting:
    """The answer to a hello: JSON, and on a unix socket the descriptor of the slab, which is closed when it is sent."""

    __slots__ = ("answer", "fd", "session")

    def __init__(self, session: Session, answer: dict[str, Any], fd: int | None) -> None:
        self.session = session
        self.answer = answer
        self.fd = fd


class Channel(asyncio.BufferedProtocol):
    """Frames in, frames out. The daemon's event loop only."""

    def __init__(self, host: Host, peer: str, *, tenant: Tenant, is_local: bool) -> None:
        self.peer = peer
        self.tenant = tenant
        self.is_local = is_local
        self.session: Session | None = None
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(BUFFER_BYTES)
        self._end = 0  # bytes in the buffer
        self._is_busy = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiter = 0
        self._greeting: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # ---- the transport's calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self._transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._end == len(self._buffer):
            self._grow(2 * len(self._buffer))
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        self._parse()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stop_waiting()
        if self._greeting is not None:
            self._greeting.cancel()
        if not self.closed.done():
            self.closed.set_result(None)
        self._host.lost(self)

    # ---- frames -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send what is left and hang up."""
        if self._transport is not None:
            self._transport.close()

    def answer(self, frame: Frame, body: bytes, status: Status = Status.OK) -> None:
        """Write an answer; go on with the next frame."""
        if self._transport is not None:
            self._transport.write(protocol.encode_frame(frame.op, body, frame.sequence, status))

    def _parse(self) -> None:
        start = 0
        while not self._is_busy and self._transport is not None and not self._transport.is_closing():
            if self._end - start < HEADER.size:
                break
            try:
                frame = protocol.decode_header(memoryview(self._buffer)[start : start + HEADER.size])
            except ProtocolError as error:
                self._refuse(Frame(Op.HELLO, Status.OK, 0, 0), error)
                return
            end = start + HEADER.size + frame.num_bytes
            if end > self._end:
                self._grow(end - start)
                break
            body = bytes(memoryview(self._buffer)[start + HEADER.size : end])
            start = end
            self._handle(frame, body)
        if start:
            self._buffer[: self._end - start] = self._buffer[start : self._end]
            self._end -= start
            if not self._end and len(self._buffer) > BUFFER_BYTES:
                self._buffer = bytearray(BUFFER_BYTES)

    def _handle(self, frame: Frame, body: bytes) -> None:
        try:
            if frame.op is Op.HELLO or frame.op is Op.ATTACH:
                self._meet(frame, protocol.decode_json(body))
            elif self.session is None:
                raise ProtocolError(f"the first frame is {frame.op.name}; it must be HELLO or ATTACH")
            else:
                result = self.session.handle(frame.op, body)
                if isinstance(result, Pending):
                    self._wait(frame, result)
                else:
                    self.answer(frame, result)
        except Resend:
            self.answer(frame, b"", Status.RESEND)
        except ProtocolError as error:
            self._refuse(frame, error)
        except KVStoreError as error:
            self.answer(frame, protocol.encode_error(error), Status.ERROR)
        except Exception as error:
            # A fault of ours in one message must not cost the other clients their daemon.
            log.exception("client %s: %s failed", self.peer, frame.op.name)
            self._refuse(frame, ProtocolError(f"{frame.op.name} failed in the daemon: {type(error).__name__}"))

    def _refuse(self, frame: Frame, error: ProtocolError) -> None:
        log.info("client %s: %s", self.peer, error)
        self.answer(frame, protocol.encode_error(error), Status.ERROR)
        self.close()

    # ---- hello --------------------------------------------------------------------------------------------------

    def _meet(self, frame: Frame, message: dict[str, Any]) -> None:
        if self.session is not None:
            raise ProtocolError(f"{frame.op.name} on a connection that has a session")
        if frame.op is Op.ATTACH:
            self.session = self._host.attach(self, message)
            self._stop_waiting()
            self.answer(frame, b"", Status.OK if self.session is not None else Status.GONE)
            return
        self._set_busy(True)
        self._stop_waiting()  # opening a store may take its time
        self._greeting = self._loop.create_task(self._greet(frame, message))

    async def _greet(self, frame: Frame, message: dict[str, Any]) -> None:
        greeting: Greeting | None = None
        try:
            greeting = await self._host.hello(self, message)
            self.session = greeting.session
            self._send_greeting(frame, greeting)
        except KVStoreError as error:
            self.answer(frame, protocol.encode_error(error), Status.ERROR)
            self.close()
        except OSError as error:
            log.warning("client %s: no hello: %s", self.peer, error)
            self.close()
        finally:
            if greeting is not None and greeting.fd is not None:
                os.close(greeting.fd)
            self._greeting = None
        self._set_busy(False)

    def _send_greeting(self, frame: Frame, greeting: Greeting) -> None:
        if self._transport is None:
            return
        body = protocol.encode_json(greeting.answer)
        if greeting.fd is None:
            self.answer(frame, body)
            return
        data = protocol.encode_frame(frame.op, body, frame.sequence)
        # Past the transport, which cannot send descriptors; nothing of ours is in its buffer yet.
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as raw:
            sent = socket.send_fds(raw, [data], [greeting.fd])
        if sent < len(data):
            self._transport.write(data[sent:])

    # ---- waiting ------------------------------------------------------------------------------------------------

    def _wait(self, frame: Frame, pending: Pending) -> None:
        session = self.session
        assert session is not None

        def end(body: bytes) -> None:
            self._stop_waiting()
            self.answer(frame, body)
            self._set_busy(False)

        def look() -> None:
            try:
                body = pending.look()
            except KVStoreError:
                body = pending.give_up()
            if body is not None:
                end(body)

        self._set_busy(True)
        self._timer = self._loop.call_later(pending.timeout_s, lambda: end(pending.give_up()))
        self._waiter = session.opened.watch.add(look)
        look()  # what changed before the waiter was known is seen here

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiter and self.session is not None:
            self.session.opened.watch.remove(self._waiter)
            self._waiter = 0

    def _set_busy(self, is_busy: bool) -> None:
        if is_busy == self._is_busy:
            return
        self._is_busy = is_busy
        if self._transport is None or self._transport.is_closing():
            return
        if is_busy:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
            self._loop.call_soon(self._parse)  # frames that came with the one that waited

    def _grow(self, num_bytes: int) -> None:
        if num_bytes > len(self._buffer):
            self._buffer += bytes(num_bytes - len(self._buffer))
