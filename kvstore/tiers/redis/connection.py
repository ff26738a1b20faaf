"""One connection to a Redis server, with pages received straight into slots and sent straight from them.

redis-py makes the connection: name, socket, TLS, AUTH, SELECT. The bytes after that are ours (`parser`).

The hard thing: a connection must never be used again while an answer is still on its way, or the next caller reads it
as its own. So it counts the replies it is owed, any trouble in the middle of one closes it, and whoever leases it
gives it back only when nothing is owed. What it has sent by then and the server has not taken must not be done later,
when somebody else has gone on: such a connection is reset, which takes back what still lies in this machine.

Every socket call gets the time that is left until the deadline of the call that leased the wire. (Resolving a host
name is the one thing that cannot be cut short; addresses need no resolving.)
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import redis.exceptions
from redis.exceptions import AuthenticationError, RedisError, ResponseError, TimeoutError

from kvstore.errors import TierUnavailable
from kvstore.tiers.redis.hedge import Hedge
from kvstore.tiers.redis.parser import LINE_BYTES, Connection, PageParser, Reply, Sink
from kvstore.tiers.redis.refusal import Account, words

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER, on, for no time: close sends a reset and nothing else
AnyHedge = Hedge[Any]  # it deals in wires
T = TypeVar("T")


def command(*args: bytes | int) -> bytes:
    """Encode one command without large values.

    >>> command(b"EXISTS", b"k")
    b'*2\\r\\n$6\\r\\nEXISTS\\r\\n$1\\r\\nk\\r\\n'
    """
    texts = [arg if isinstance(arg, bytes) else b"%d" % arg for arg in args]
    return b"*%d\r\n" % len(texts) + b"".join([b"$%d\r\n%b\r\n" % (len(text), text) for text in texts])


class RedisConnection:
    """A connection during one call: send commands, then take as many replies.

    Used by one thread at a time. Anything but an error reply of the server closes it and raises TierUnavailable.
    """

    def __init__(self, where: str, connect: Callable[[PageParser], Connection], account: Account | None = None) -> None:
        """`connect` makes a connection that uses the given parser, and does not open it yet."""
        self.where = where
        self.account = account or Account()
        self._hedge: AnyHedge | None = None  # until the first answer of a call
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

    def resume(self, deadline: float, hedge: AnyHedge | None = None) -> bool:
        """Take an idle wire up again; False if the server has closed it or sent what nobody asked for.

        hedge: how to ask again if it turns out to be dead; None for what may be asked once only.
        """
        self._parser.deadline = deadline
        self._parser.is_silent = True
        self._hedge = hedge
        try:
            return self._connection.is_connected and not self._connection.can_read(0)
        except (OSError, RedisError):
            return False

    def send(self, buffers: Sequence[bytes | memoryview], *, replies: int) -> None:
        """Send encoded commands that will be answered by `replies` replies."""
        self._owed += replies
        if self._hedge is not None:
            if not self._hedge.send(self._parser, buffers):
                self._become(self._hedge.ask_again(self._parser.deadline))
            return
        with self._unavailable():
            self._parser.send(buffers)

    def replies(self, count: int) -> list[Reply]:
        """Take `count` replies. A failed command answers with a ResponseError in its place."""
        with self._unavailable():
            if self._hedge is None:
                replies = self._parser.read_replies(count)
            else:
                replies = self._first_answer(self._hedge, lambda: self._parser.read_replies(count))
        self._owed -= count
        return replies

    def reply_into(self, sink: Sink, count: int) -> list[int | None] | ResponseError:
        """Take one reply, an array of `count` strings, into `sink`; return their lengths, None for absent ones."""
        with self._unavailable():
            if self._hedge is None:
                reply = self._parser.read_into(sink, count)
            else:
                reply = self._first_answer(self._hedge, lambda: self._parser.read_into(sink, count))
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
    def link(self) -> socket.socket | None:
        """The socket; None if not connected."""
        return self._parser.link

    @property
    def is_reusable(self) -> bool:
        """True while connected and owed nothing."""
        return self._owed == 0 and bool(self._connection.is_connected)

    def close(self) -> None:
        """Disconnect. Idempotent. What was asked and not answered is taken back, as far as it has not left."""
        link = self.link
        if self._owed and link is not None:
            with suppress(OSError):  # a socket that is not connected any more
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._connection.disconnect()

    def unavailable(self, error: Exception) -> TierUnavailable:
        """The exception for `error`, in words an operator can act on."""
        return TierUnavailable(f"redis {self.where}: {_reason(error, self.account)}")

    def _become(self, other: RedisConnection) -> None:
        """Go on with the connection of `other`, and close ours."""
        self._hedge = None
        self._connection, other._connection = other._connection, self._connection
        self._parser, other._parser = other._parser, self._parser
        other._owed = self._owed  # the one that is given up was asked as well
        other.close()

    def _first_answer(self, hedge: AnyHedge, read: Callable[[], T]) -> T:
        """Read what comes first after a wire was taken up again, here or on a fresh connection."""
        self._hedge = None
        other = hedge.await_answer(self._parser)
        if other is not None:
            self._become(other)
            return read()
        try:
            return read()
        except (redis.exceptions.ConnectionError, ConnectionError):
            # Closed by the server at the very moment at which we asked: it has read nothing of it, or may do it again.
            if not self._parser.is_silent:
                raise
        self._become(hedge.ask_again(self._parser.deadline))
        return read()

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


def _reason(error: Exception, account: Account) -> str:
    text = str(error)
    if isinstance(error, ResponseError) and not isinstance(error, AuthenticationError):
        return words(error, account)
    if isinstance(error, AuthenticationError):
        if "required" in text.lower():
            return f"it asks for a password ({text}) Put it into redis.url: redis://user:password@host"
        return f"it refuses the user or password of redis.url ({text})"
    if isinstance(error, TimeoutError | OSError) and "timed out" in text.lower():
        return "no answer in time"
    return text or type(error).__name__
