"""A way out for a call whose idle connection is dead and does not say so.

Load balancers and NAT forget connections that were idle for some minutes, without a word: what is sent then is dropped,
and nothing is answered until the caller's time is up. So a connection that is taken up again has to say something
within a part of the time; if it does not, the same requests go out on a fresh one, and whichever answers first is used.

    taken up            asked                      silent for a quarter of the time            answered
       |------------------|---------------------------------|-- dial, ask again --|---------------|
                          '---------------- the old one may still answer first -------------------'

Only requests that may be done twice are repeated, and only the first of a call: a connection that has answered once is
alive. One that was in use a moment ago is not suspected, so a server that is slow under load gets no second requests;
of such a one only its end is taken for an end.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from redis.exceptions import RedisError

from kvstore.errors import TierUnavailable

PATIENCE = 0.25  # of the time that is left
PATIENCE_MAX_S = 1.0
IDLE_S = 0.25  # shorter pauses are those of a connection in use

Buffers = Sequence[bytes | memoryview]


class HedgedConnection(Protocol):
    """One end of a connection (`redis_parser.PageParser`)."""

    deadline: float

    @property
    def holds_bytes(self) -> bool: ...

    @property
    def link(self) -> socket.socket | None: ...

    def send(self, buffers: Buffers) -> None: ...


class Fresh(Protocol):
    """A connection just made (`RedisConnection`)."""

    @property
    def link(self) -> socket.socket | None: ...

    def send(self, buffers: Buffers, *, replies: int) -> None: ...

    def close(self) -> None: ...


F = TypeVar("F", bound=Fresh)


class Hedge(Generic[F]):
    """The requests of a call so far, and how to ask them again. One call's thread.

    dial:        dial(deadline) returns a fresh open wire, or raises TierUnavailable.
    replaced:    called when the old connection is given up: others of its age will be dead too.
    is_doubtful: the connection was idle for a while, so silence is a sign; otherwise only its end is.
    """

    def __init__(self, dial: Callable[[float], F], replaced: Callable[[], None], *, is_doubtful: bool = True) -> None:
        self._dial = dial
        self._replaced = replaced
        self._is_doubtful = is_doubtful
        self._sent: list[Buffers] = []

    def send(self, line: HedgedConnection, buffers: Buffers) -> bool:
        """Send, and remember it; False if the connection did not take it within its part of the time."""
        self._sent.append(buffers)
        deadline = line.deadline
        if self._is_doubtful:
            line.deadline = _patience_until(deadline)
        try:
            line.send(buffers)
        except (OSError, RedisError):
            return False
        finally:
            line.deadline = deadline
        return True

    def await_answer(self, line: HedgedConnection) -> F | None:
        """Wait until an answer begins: here (None), or on the fresh wire that is returned.

        What is wrong with the line beside its silence, and the end of the time, is left to the read that follows.
        """
        ours = line.link
        if ours is None or line.holds_bytes or not self._is_doubtful:
            return None
        is_readable = _first_readable([ours], _patience_until(line.deadline)) is ours
        if is_readable and not _has_ended(ours):
            return None
        try:
            other = self.ask_again(line.deadline)
        except TierUnavailable:
            return None  # this one has the rest of the time
        theirs = other.link
        if not is_readable and theirs is not None:
            first = _first_readable([ours, theirs], line.deadline)
            if first is ours and not _has_ended(ours):
                other.close()
                return None
        return other

    def ask_again(self, deadline: float) -> F:
        """Send all requests of this call on a fresh connection. Raises TierUnavailable."""
        other = self._dial(deadline)
        for buffers in self._sent:
            other.send(buffers, replies=0)
        self._replaced()
        return other


def _patience_until(deadline: float) -> float:
    now = time.monotonic()
    return now + min(PATIENCE_MAX_S, max(0.0, deadline - now) * PATIENCE)


def _first_readable(links: Sequence[socket.socket], until: float) -> socket.socket | None:
    """The first of `links` that has something to read, or has ended; None if none has by then."""
    poll = select.poll()
    for link in links:
        poll.register(link, select.POLLIN)
    numbers = {number for number, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000)}
    return next((link for link in links if link.fileno() in numbers), None)


def _has_ended(link: socket.socket) -> bool:
    """True if a readable socket has nothing more to say. Of TLS it cannot be seen from here: False."""
    with suppress(ValueError):  # a TLS socket takes no flags
        try:
            return not link.recv(1, socket.MSG_PEEK)
        except OSError:
            return True
    return False
