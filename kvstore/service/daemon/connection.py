"""One connection of a client, in the daemon's event loop.

It cuts what arrives into frames, hands them to the session one at a time, and writes the answers. While an answer is
pending, or answers are not taken, it reads no further: a client cannot pile up work, nor answers. Memory is taken for
what has come, not for what a header announces. Whatever is no frame of this protocol, or does not become a whole one in
good time, is told once and ends the connection, and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, Protocol, cast

from kvstore import logs
from kvstore.errors import KVStoreError
from kvstore.service.daemon.greeting import Greeting
from kvstore.service.daemon.patience import Patience
from kvstore.service.daemon.pending import Pending
from kvstore.service.daemon.rawsocket import RawSocket
from kvstore.service.daemon.requests import Resend
from kvstore.service.daemon.session import ClientSession
from kvstore.service.protocol import frames
from kvstore.service.protocol.frames import HEADER, Frame, Kind, OtherVersion, ProtocolError, ReplyStatus

log = logs.limited(__name__)

BUFFER_BYTES = 64 << 10  # the keys of 2000 blocks; a message that is longer gets a larger one
HELLO_TIMEOUT_S = 5.0  # a connection that says nothing is closed


class Host(Protocol):
    """The daemon as a channel sees it."""

    async def hello(self, channel: Channel, message: dict[str, Any]) -> Greeting:
        """Open a session for a client. Raises KVStoreError."""

    def attach(self, channel: Channel, message: dict[str, Any]) -> Greeting | None:
        """The session that a further connection belongs to, with its slab if asked for; None if it is gone."""

    def lost(self, channel: Channel) -> None:
        """The connection is closed."""

    def may_hold(self, channel: Channel, num_bytes: int) -> bool:
        """Whether so many more bytes may be held for a message that is not whole; negative gives them back."""


class Channel(asyncio.BufferedProtocol):
    """Frames in, frames out. The daemon's event loop only."""

    def __init__(self, host: Host, peer: str) -> None:
        self.peer = peer
        self.session: ClientSession | None = None
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(BUFFER_BYTES)
        self._end = 0  # bytes in the buffer
        self._is_busy = False  # an answer is pending
        self._is_reading = True
        self._patience = Patience(self._refuse)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiter = 0
        self._greeting: asyncio.Task[None] | None = None
        self._raw: RawSocket | None = None
        self._may_write = True

    @property
    def pid(self) -> int | None:
        """The process at the other end; None if it cannot be told."""
        return None if self._raw is None else self._raw.pid

    # ---- the transport's calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._raw = RawSocket(self._transport)
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self._transport.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._end == len(self._buffer):
            self._grow()
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        self._parse()

    def pause_writing(self) -> None:
        self._may_write = False
        self._read_or_not()

    def resume_writing(self) -> None:
        self._may_write = True
        self._read_or_not()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._raw = None
        self._may_write = True
        self._stop_waiting()
        self._patience.end()
        self._host.may_hold(self, BUFFER_BYTES - len(self._buffer))
        if self._greeting is not None:
            self._greeting.cancel()
        self._host.lost(self)

    # ---- frames -------------------------------------------------------------------------------------------------

    def tell_lost(self) -> None:
        """Tell the other side that its session ends, and wait for it to hang up."""
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def close(self) -> None:
        """Send what is left and hang up."""
        if self._transport is not None:
            self._transport.close()
            if self._transport.get_write_buffer_size():  # the other side does not take them: not for ever
                self._loop.call_later(HELLO_TIMEOUT_S, self._transport.abort)

    def answer(
        self, frame: Frame, body: bytes, status: ReplyStatus = ReplyStatus.OK, *, version: int = frames.VERSION
    ) -> None:
        """Write an answer; go on with the next frame."""
        if self._transport is not None:
            self._transport.write(frames.encode_frame(frame.kind, body, frame.sequence, status, version=version))

    def _parse(self) -> None:
        start, frame = 0, None
        while self._may_parse:
            if self._end - start < HEADER.size:
                break
            try:
                frame = frames.decode_header(memoryview(self._buffer)[start : start + HEADER.size])
            except ProtocolError as error:
                return self._refuse(Frame(Kind.HELLO, ReplyStatus.OK, 0, 0), error)
            end = start + HEADER.size + frame.num_bytes
            if end > self._end:
                break
            body = bytes(memoryview(self._buffer)[start + HEADER.size : end])
            start = end
            self._handle(frame, body)
        if start:
            self._buffer[: self._end - start] = self._buffer[start : self._end]
            self._end -= start
            if not self._end and len(self._buffer) > BUFFER_BYTES:
                self._host.may_hold(self, BUFFER_BYTES - len(self._buffer))
                self._buffer = bytearray(BUFFER_BYTES)
            self._patience.end()
        self._await_rest(frame)

    @property
    def _may_parse(self) -> bool:
        transport = self._transport
        return not (self._is_busy or not self._may_write or transport is None or transport.is_closing())

    def _handle(self, frame: Frame, body: bytes) -> None:
        try:
            if frame.kind is not Kind.CALL:
                self._meet(frame, frames.decode_json(body))
            elif self.session is None:
                raise ProtocolError(f"the first frame is {frame.kind.name}; it must be HELLO or ATTACH")
            else:
                result = self.session.handle(body)
                if isinstance(result, Pending):
                    self._wait(frame, result)
                else:
                    self.answer(frame, result)
        except Resend:
            self.answer(frame, b"", ReplyStatus.RESEND)
        except ProtocolError as error:
            self._refuse(frame, error)
        except KVStoreError as error:
            self.answer(frame, frames.encode_error(error), ReplyStatus.ERROR)
        except Exception as error:
            # A fault of ours in one message must not cost the other clients their daemon.
            log.error("client %s: %s failed: %s", self.peer, frame.kind.name, logs.where(error))
            self._refuse(frame, ProtocolError(f"{frame.kind.name} failed in the daemon: {type(error).__name__}"))

    def _refuse(self, frame: Frame, error: ProtocolError) -> None:
        log.info("client %s: %s", self.peer, error)
        version = error.version if isinstance(error, OtherVersion) else frames.VERSION  # it can read no other
        self.answer(frame, frames.encode_error(error), ReplyStatus.ERROR, version=version)
        self.close()

    # ---- hello --------------------------------------------------------------------------------------------------

    def _meet(self, frame: Frame, message: dict[str, Any]) -> None:
        if self.session is not None:
            raise ProtocolError(f"{frame.kind.name} on a connection that has a session")
        if frame.kind is Kind.ATTACH:
            greeting = self._host.attach(self, message)
            self._stop_waiting()
            if greeting is None:
                self.answer(frame, b"", ReplyStatus.GONE)
                self.close()
            else:
                self._welcome(frame, greeting)
            return
        self._set_busy(True)
        self._stop_waiting()  # opening a store may take its time
        self._greeting = self._loop.create_task(self._greet(frame, message))

    async def _greet(self, frame: Frame, message: dict[str, Any]) -> None:
        try:
            self._welcome(frame, await self._host.hello(self, message))
        except KVStoreError as error:
            log.warning("a client is refused (%s): %s", self.peer, logs.mask(str(error)))
            self.answer(frame, frames.encode_error(error), ReplyStatus.ERROR)
            self.close()
        except OSError as error:
            log.warning("client %s: no hello: %s", self.peer, error)
            self.close()
        except Exception as error:
            log.error("client %s: %s failed: %s", self.peer, frame.kind.name, logs.where(error))
            self._refuse(frame, ProtocolError(f"{frame.kind.name} failed in the daemon: {type(error).__name__}"))
        finally:
            self._greeting = None
        self._set_busy(False)

    def _welcome(self, frame: Frame, greeting: Greeting) -> None:
        self.session = greeting.session
        try:
            self._send_greeting(frame, greeting)
        except OSError as error:  # it does not read, or the system has too many descriptors under way
            log.warning("client %s: no hello: %s", self.peer, error)
            self.close()
        finally:
            for fd in greeting.fds:
                os.close(fd)

    def _send_greeting(self, frame: Frame, greeting: Greeting) -> None:
        if self._raw is None:
            return
        body = b"" if greeting.answer is None else frames.encode_json(greeting.answer)
        if not greeting.fds:
            self.answer(frame, body)
        else:
            self._raw.send_descriptors(frames.encode_frame(frame.kind, body, frame.sequence), greeting.fds)

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
        self._is_busy = is_busy
        self._read_or_not()

    def _read_or_not(self) -> None:
        is_wanted = not self._is_busy and self._may_write
        if is_wanted == self._is_reading or self._transport is None or self._transport.is_closing():
            return
        self._is_reading = is_wanted
        if not is_wanted:
            self._transport.pause_reading()
            return
        self._transport.resume_reading()
        self._loop.call_soon(self._parse)  # frames that came with the one that waited

    def _await_rest(self, frame: Frame | None) -> None:
        if self._end > 0 and self._is_reading and self.session is not None:  # before, another timer runs
            self._patience.begin(frame)
        else:
            self._patience.end()

    def _grow(self) -> None:
        """Make room for more of a message: twice as much, up to the longest there is."""
        size = min(2 * len(self._buffer), HEADER.size + frames.MAX_BODY_BYTES)
        if size == len(self._buffer) or not self._host.may_hold(self, size - len(self._buffer)):
            log.warning("client %s: too many large messages are under way; this one is not taken", self.peer)
            raise OSError(errno.ENOBUFS, "too many large messages are under way")  # it ends this connection
        # A new one: the loop may hold a view of the old, which then cannot be resized.
        grown = bytearray(size)
        grown[: self._end] = memoryview(self._buffer)[: self._end]
        self._buffer = grown
