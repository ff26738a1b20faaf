"""Reads the replies of a Redis server, with pages received straight into slots.

redis-py's stock parsers collect a reply in buffers of their own and hand out `bytes`, which costs two to four more
copies of every page, under the GIL. This one takes their place (`parser_class`): redis-py uses it for the handshake,
`RedisConnection` for the rest. The same few lines serve plain, unix and TLS sockets, since a TLS socket can
`recv_into` as well.

Every socket call gets the time that is left until `deadline`. One thread at a time.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Protocol

from redis._parsers import _RESP2Parser
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    ResponseError,
    TimeoutError,
)

LINE_BYTES = 16 << 10  # longest line of a reply; also what is read at a time while no page is expected
# Read at a time around a page: lines, header and a short last part at once, and little of the body, which is copied.
HEAD_BYTES = 512
BULK_BYTES = 1 << 20  # longest string that is not received into a sink; a longer one is a garbled length
ARRAY_LENGTH = 1 << 20
NESTING = 8  # lists in lists; CLUSTER SLOTS has three levels
PAGE_BYTES = 512 << 20  # what Redis itself allows; a longer string is a garbled length
IOV_BUFFERS = 512  # the kernel takes 1024

INTEGER = ord(":")

# bytes, int, None, a list of replies, or a ResponseError as a value: one failed command of several is no failed call.
Reply = Any
Connection = Any  # redis-py's; its methods have no types


class Sink(Protocol):
    """The destinations of a reply's strings, laid end to end."""

    def window(self, num_bytes: int) -> memoryview:
        """The next place, at most `num_bytes` long; empty once full."""

    def advance(self, num_bytes: int) -> None:
        """That many bytes have been put there."""


class PageParser(_RESP2Parser):
    """Reads RESP2 replies from a socket until `deadline`; redis-py uses it for the handshake, ours for the rest."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)  # type: ignore[no-untyped-call]
        self.deadline = 0.0  # of time.monotonic()
        self.is_silent = True  # nothing was received since somebody set this
        self._line = bytearray(LINE_BYTES)
        self._view = memoryview(self._line)
        self._start = self._end = 0  # [start, end) of the line buffer is read and not yet used

    # -- what redis-py calls

    def on_connect(self, connection: Connection) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._start = self._end = 0

    def can_read(self, timeout: float = 0) -> bool:
        """True if something waits, be it the end of the stream: either way an idle connection is of no more use."""
        if self._end > self._start:
            return True
        self._socket.settimeout(timeout)
        try:
            self._socket.recv_into(self._view)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        return True

    def read_response(self, disable_decoding: bool = False, timeout: object = None) -> Reply:
        reply = self._reply(LINE_BYTES)
        if isinstance(reply, ResponseError):
            raise reply  # as redis-py's own parsers: the handshake tells an old server by it
        return reply

    # -- what a RedisConnection calls

    def read_replies(self, count: int) -> list[Reply]:
        """Read `count` replies. A lookup has a thousand integers, so these take a shorter way than the rest."""
        replies: list[Reply] = []
        while len(replies) < count:
            start = self._start
            end = self._line.find(b"\r\n", start, self._end)
            if end > start and self._line[start] == INTEGER:
                replies.append(_number(self._line[start:end]))
                self._start = end + 2
            else:
                replies.append(self._reply(LINE_BYTES))
        return replies

    def read_into(self, sink: Sink, count: int) -> list[int | None] | ResponseError:
        """Read an array of `count` strings, laying them end to end into `sink`; return their lengths, None for absent.

        What does not fit is read and thrown away, so that the connection stays usable.
        """
        line = self._next_line(HEAD_BYTES)
        if line[:1] != b"*":
            reply = self._parse(line, HEAD_BYTES)
            if isinstance(reply, ResponseError):
                return reply
            raise InvalidResponse(f"expected an array of strings, got {bytes(line[:40])!r}")
        lengths: list[int | None] = []
        if _length(line, ARRAY_LENGTH) != count:
            raise InvalidResponse(f"expected {count} strings, got {bytes(line[:40])!r}")
        for _ in range(count):
            line = self._next_line(HEAD_BYTES)
            if line[:1] != b"$":
                raise InvalidResponse(f"expected a string, got {bytes(line[:40])!r}")
            length = _length(line, PAGE_BYTES)
            lengths.append(None if length < 0 else length)
            if length >= 0:
                self._receive(length, sink)
        return lengths

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send buffers one after the other, without joining them."""
        if isinstance(self._socket, ssl.SSLSocket):
            for buffer in buffers:
                self._socket.settimeout(self._left())
                self._socket.sendall(buffer)
            return
        queue = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while queue:
            self._socket.settimeout(self._left())
            sent = self._socket.sendmsg(queue[:IOV_BUFFERS])
            done = 0
            while done < len(queue) and sent >= queue[done].nbytes:
                sent -= queue[done].nbytes
                done += 1
            del queue[:done]
            if sent:
                queue[0] = queue[0][sent:]

    # -- private

    def _reply(self, read_bytes: int, depth: int = 0) -> Reply:
        return self._parse(self._next_line(read_bytes), read_bytes, depth)

    def _parse(self, line: bytearray, read_bytes: int, depth: int = 0) -> Reply:
        kind = line[:1]
        if kind == b":":
            return _number(line)
        if kind == b"+":
            return bytes(line[1:])
        if kind == b"$":
            length = _length(line, BULK_BYTES)
            return None if length < 0 else self._bulk(length)
        if kind == b"*" and depth < NESTING:
            count = _length(line, ARRAY_LENGTH)
            return None if count < 0 else [self._reply(read_bytes, depth + 1) for _ in range(count)]
        if kind == b"-":
            return self._error(line[1:].decode(errors="replace"))
        raise InvalidResponse(f"a reply starts with {bytes(line[:40])!r}")

    def _error(self, text: str) -> ResponseError:
        try:
            error = self.parse_error(text)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError):  # a redirect that does not say where to
            raise InvalidResponse(f"an error reply cannot be read: {text[:80]!r}") from None
        if isinstance(error, BusyLoadingError):  # redis-py calls it a broken connection, but it is an answer
            return ResponseError(text)
        if isinstance(error, ResponseError):
            return error
        raise error  # NOAUTH, too many clients: the server will not talk to us

    def _next_line(self, read_bytes: int) -> bytearray:
        while True:
            end = self._line.find(b"\r\n", self._start, self._end)
            if end >= 0:
                line = self._line[self._start : end]
                self._start = end + 2
                return line
            self._fill(read_bytes)

    def _fill(self, read_bytes: int) -> None:
        held = self._end - self._start
        if held == LINE_BYTES:
            raise InvalidResponse(f"a line of a reply is longer than {LINE_BYTES} bytes")
        if self._start and (not held or self._end == LINE_BYTES):
            self._line[:held] = self._line[self._start : self._end]
            self._start, self._end = 0, held
        self._end += self._recv(self._view[self._end : self._end + read_bytes])

    def _bulk(self, length: int) -> bytes:
        text = bytearray(length + 2)
        view = memoryview(text)
        done = self._take(view)
        while done < len(text):
            done += self._recv(view[done:])
        if text[length:] != b"\r\n":
            raise InvalidResponse("a string does not end where its length says")
        return bytes(view[:length])

    def _receive(self, length: int, sink: Sink) -> None:
        left = length
        while left:
            window = sink.window(left)
            if len(window):
                got = self._take(window) or self._recv(window)
                sink.advance(got)
            else:
                scrap = memoryview(bytearray(min(left, LINE_BYTES)))
                got = self._take(scrap) or self._recv(scrap)
            left -= got
        while self._end - self._start < 2:
            self._fill(HEAD_BYTES)
        if self._line[self._start : self._start + 2] != b"\r\n":
            raise InvalidResponse("a string does not end where its length says")
        self._start += 2

    def _take(self, window: memoryview) -> int:
        """Move what the line buffer holds into `window`; return how much."""
        num_bytes = min(self._end - self._start, len(window))
        window[:num_bytes] = self._view[self._start : self._start + num_bytes]
        self._start += num_bytes
        return num_bytes

    def _recv(self, window: memoryview) -> int:
        self._socket.settimeout(self._left())
        num_bytes = self._socket.recv_into(window)
        if not num_bytes:
            raise ConnectionError("the server closed the connection")
        self.is_silent = False
        return num_bytes

    @property
    def holds_bytes(self) -> bool:
        """True if something was received that nobody has taken yet."""
        return bool(self._end > self._start)

    @property
    def link(self) -> socket.socket | None:
        """The source of the bytes; None if not connected."""
        link: socket.socket | None = self._sock
        return link

    @property
    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionError("not connected")
        sock: socket.socket = self._sock
        return sock

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left


def _number(line: bytearray) -> int:
    try:
        return int(line[1:])
    except ValueError:
        raise InvalidResponse(f"not a number: {bytes(line[:40])!r}") from None


def _length(line: bytearray, most: int) -> int:
    """-1 says that there is nothing, not even an empty string or list."""
    length = _number(line)
    if not -1 <= length <= most:
        raise InvalidResponse(f"a length of {length} is out of range")
    return length
