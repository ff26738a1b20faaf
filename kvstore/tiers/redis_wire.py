"""One connection to a Redis server, with pages received straight into slots and sent straight from them.

redis-py makes the connection: name, socket, TLS, AUTH, SELECT. The bytes after that are ours, through the place
redis-py has for it (`parser_class`): the stock parsers collect a reply in buffers of their own and hand out `bytes`,
which costs two to four more copies of every page, under the GIL. The same few lines serve plain, unix and TLS sockets,
since a TLS socket can `recv_into` as well.

The hard thing: a connection must never be used again while an answer is still on its way, or the next caller reads it
as its own. So a Wire counts the replies it is owed, any trouble in the middle of one closes it, and whoever leases it
gives it back only when nothing is owed.

Every socket call gets the time that is left until the deadline of the call that leased the wire. (Resolving a host
name is the one thing that cannot be cut short; addresses need no resolving.)
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from redis._parsers import _RESP2Parser
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    RedisError,
    ResponseError,
    TimeoutError,
)

from kvstore.errors import TierUnavailable

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
    """Where the strings of a reply go, laid end to end."""

    def window(self, num_bytes: int) -> memoryview:
        """The next place, at most `num_bytes` long; empty once full."""

    def advance(self, num_bytes: int) -> None:
        """That many bytes have been put there."""


def command(*args: bytes | int) -> bytes:
    """Encode one command without large values.

    >>> command(b"EXISTS", b"k")
    b'*2\\r\\n$6\\r\\nEXISTS\\r\\n$1\\r\\nk\\r\\n'
    """
    texts = [arg if isinstance(arg, bytes) else b"%d" % arg for arg in args]
    return b"*%d\r\n" % len(texts) + b"".join([b"$%d\r\n%b\r\n" % (len(text), text) for text in texts])


class PageParser(_RESP2Parser):
    """Reads RESP2 replies from a socket until `deadline`; redis-py uses it for the handshake, a Wire for the rest."""

    def __init__(self, socket_read_size: int) -> None:
        super().__init__(socket_read_size)  # type: ignore[no-untyped-call]
        self.deadline = 0.0  # of time.monotonic()
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
        return self._reply(LINE_BYTES)

    # -- what a Wire calls

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
        if isinstance(error, ResponseError):
            return error
        raise error  # LOADING, NOAUTH, too many clients: the server will not talk to us

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
        return num_bytes

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


class Wire:
    """A connection during one call: send commands, then take as many replies.

    Used by one thread at a time. Anything but an error reply of the server closes it and raises TierUnavailable.
    """

    def __init__(self, where: str, connect: Callable[[PageParser], Connection]) -> None:
        """`connect` makes a connection that uses the given parser, and does not open it yet."""
        self.where = where
        self._parser = PageParser(LINE_BYTES)
        self._connection = connect(self._parser)
        self._owed = 0

    def open(self, deadline: float, *, connect_timeout_s: float) -> None:
        """Connect, authenticate and select the database."""
        self._parser.deadline = deadline
        with self._unavailable():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no time left to connect")
            self._connection.socket_connect_timeout = min(connect_timeout_s, left)
            self._connection.socket_timeout = left
            self._connection.connect()

    def resume(self, deadline: float) -> bool:
        """Take an idle wire up again; False if the server has closed it or sent what nobody asked for."""
        self._parser.deadline = deadline
        try:
            return self._connection.is_connected and not self._connection.can_read(0)
        except (OSError, RedisError):
            return False

    def send(self, buffers: Sequence[bytes | memoryview], *, replies: int) -> None:
        """Send encoded commands that will be answered by `replies` replies."""
        self._owed += replies
        with self._unavailable():
            self._parser.send(buffers)

    def replies(self, count: int) -> list[Reply]:
        """Take `count` replies. A failed command answers with a ResponseError in its place."""
        with self._unavailable():
            replies = self._parser.read_replies(count)
        self._owed -= count
        return replies

    def reply_into(self, sink: Sink, count: int) -> list[int | None] | ResponseError:
        """Take one reply, an array of `count` strings, into `sink`; return their lengths, None for absent ones."""
        with self._unavailable():
            reply = self._parser.read_into(sink, count)
        self._owed -= 1
        return reply

    def ask(self, commands: Sequence[Sequence[bytes | int]]) -> list[Reply]:
        """Send small commands in one go and take their replies: one round trip."""
        self.send([b"".join([command(*args) for args in commands])], replies=len(commands))
        return self.replies(len(commands))

    def ask_each(self, verb: bytes, names: Sequence[bytes]) -> list[Reply]:
        """`ask` for one command about each of many keys, encoded eight times as fast."""
        start = b"*2\r\n$%d\r\n%b\r\n" % (len(verb), verb)
        self.send([b"".join([b"%b$%d\r\n%b\r\n" % (start, len(name), name) for name in names])], replies=len(names))
        return self.replies(len(names))

    @property
    def is_reusable(self) -> bool:
        """True while connected and owed nothing."""
        return self._owed == 0 and bool(self._connection.is_connected)

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._connection.disconnect()

    def unavailable(self, error: Exception) -> TierUnavailable:
        """What to raise for `error`, in words an operator can act on."""
        return TierUnavailable(f"redis {self.where}: {_reason(error)}")

    @contextmanager
    def _unavailable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RedisError) as error:
            self.close()
            raise self.unavailable(error) from error
        except BaseException:
            self.close()
            raise


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


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, AuthenticationError):
        if "required" in text.lower():
            return f"it asks for a password ({text}) Put it into redis.url: redis://user:password@host"
        return f"it refuses the user or password of redis.url ({text})"
    if isinstance(error, TimeoutError | OSError) and "timed out" in text.lower():
        return "no answer in time"
    return text or type(error).__name__
