from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis._parsers import _RESP2Parser
from redis.exceptions import MovedError, OutOfMemoryError

from kvstore.errors import TierUnavailable
from kvstore.tiers.redis.connection import RedisConnection, command
from kvstore.tiers.redis.parser import LINE_BYTES, PageParser


class PairConnection:
    """One end of a socket pair in the place of redis-py's connection."""

    def __init__(self, parser: PageParser, sock: socket.socket) -> None:
        self.encoder: Any = None
        self.socket_timeout: float | None = None
        self.socket_connect_timeout: float | None = None
        self._parser, self._sock = parser, sock
        self.is_connected = False

    def connect(self) -> None:
        self._parser.on_connect(self)
        self.is_connected = True

    def can_read(self, timeout: float) -> bool:
        return self._parser.can_read(timeout)

    def disconnect(self) -> None:
        self.is_connected = False
        self._parser.on_disconnect()  # type: ignore[no-untyped-call]
        self._sock.close()


class Flat:
    """A sink over one buffer."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.done = 0

    def window(self, num_bytes: int) -> memoryview:
        return memoryview(self.data)[self.done : self.done + num_bytes]

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes


class Peer:
    """An open wire and the server's end of it."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        ours, self.server = socket.socketpair()
        self.wire = RedisConnection("test:1", lambda parser: PairConnection(parser, ours))
        self.wire.open(time.monotonic() + timeout_s, connect_timeout_s=1.0)

    def close(self) -> None:
        self.wire.close()
        self.server.close()

    def asked(self, *answers: bytes) -> list[Any]:
        """The replies to as many commands, if the server answers with these bytes."""
        self.server.sendall(b"".join(answers))
        return self.wire.ask([(b"X",)] * len(answers))


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_redis_py_still_has_the_parser_we_extend() -> None:
    # A private name of redis-py: pyproject pins the major version, this test tells when even that was not enough.
    assert issubclass(PageParser, _RESP2Parser)
    assert callable(_RESP2Parser.parse_error)


def test_replies_of_every_kind_are_read(peer: Peer) -> None:
    assert peer.asked(b"+OK\r\n", b":42\r\n", b"$5\r\nhello\r\n", b"$-1\r\n", b"*-1\r\n", b"$0\r\n\r\n") == [
        b"OK",
        42,
        b"hello",
        None,
        None,
        b"",
    ]
    assert peer.asked(b"*2\r\n:1\r\n*1\r\n$1\r\na\r\n") == [[1, [b"a"]]]
    assert peer.server.recv(999) == command(b"X") * 7
    assert peer.wire.is_reusable


def test_an_error_is_a_value_among_other_replies(peer: Peer) -> None:
    moved, oom, ok = peer.asked(b"-MOVED 5 h:1\r\n", b"-OOM command not allowed\r\n", b"+OK\r\n")

    assert isinstance(moved, MovedError)
    assert isinstance(oom, OutOfMemoryError)
    assert ok == b"OK"
    assert peer.wire.is_reusable


@pytest.mark.parametrize("text", ["ERR max number of clients reached", "NOAUTH Authentication required."])
def test_a_server_that_does_not_talk_to_us_is_unavailable(peer: Peer, text: str) -> None:
    with pytest.raises(TierUnavailable, match=r"^redis test:1: "):
        peer.asked(b"-%s\r\n" % text.encode())

    assert not peer.wire.is_reusable


@pytest.mark.parametrize(
    "answer",
    [
        b"?\r\n",
        b"\r\n",
        b":x\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$99999999999\r\n",
        b"*99999999999\r\n",
        b"$3\r\nabcde",
        b"*1\r\n" * 2000,
        b"-MOVED\r\n",
        b"-MOVED 1 nowhere\r\n",
        b"-ASK x h:1\r\n",
        b"x" * (LINE_BYTES + 1),
    ],
)
def test_a_garbled_reply_closes_the_wire(peer: Peer, answer: bytes) -> None:
    with pytest.raises(TierUnavailable):
        peer.asked(answer)

    assert not peer.wire.is_reusable


@given(
    values=st.lists(st.one_of(st.none(), st.binary(max_size=300)), max_size=5),
    cuts=st.lists(st.integers(1, 90), min_size=1),
)
def test_strings_are_laid_end_to_end_whatever_pieces_they_arrive_in(
    values: list[bytes | None], cuts: list[int]
) -> None:
    answer = b"*%d\r\n" % len(values)
    answer += b"".join(b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in values)
    sink = Flat(2000)
    peer = Peer()

    def serve() -> None:
        rest, turn = answer + b"+OK\r\n", 0
        while rest:
            size = cuts[turn % len(cuts)]
            peer.server.sendall(rest[:size])
            rest, turn = rest[size:], turn + 1

    peer.wire.send([command(b"MGET"), command(b"PING")], replies=2)
    thread = threading.Thread(target=serve)
    thread.start()
    lengths = peer.wire.reply_into(sink, len(values))
    after = peer.wire.replies(1)
    thread.join()
    peer.close()

    assert lengths == [None if v is None else len(v) for v in values]
    assert bytes(sink.data[: sink.done]) == b"".join(v or b"" for v in values)
    assert after == [b"OK"]


def test_what_does_not_fit_is_read_past(peer: Peer) -> None:
    sink = Flat(4)
    peer.server.sendall(b"*2\r\n$3\r\nabc\r\n$40000\r\n" + b"d" * 40000 + b"\r\n+OK\r\n")

    peer.wire.send([command(b"X")], replies=2)

    assert peer.wire.reply_into(sink, 2) == [3, 40000]
    assert bytes(sink.data) == b"abcd"
    assert peer.wire.replies(1) == [b"OK"]
    assert peer.wire.is_reusable


PIECES = [
    b"*",
    b"$",
    b":",
    b"-",
    b"+",
    b"\r\n",
    b"0",
    b"1",
    b"2",
    b"-1",
    b"7",
    b"MOVED 1 h:1",
    b"OOM x",
    b"LOADING",
    b"ab",
]


@given(answer=st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=5)), max_size=40).map(b"".join))
def test_no_answer_does_more_harm_than_closing_the_wire(answer: bytes) -> None:
    for into_sink in (False, True):
        peer = Peer()
        peer.server.sendall(answer)
        peer.server.shutdown(socket.SHUT_WR)
        peer.wire.send([command(b"X")], replies=1)
        try:
            if into_sink:
                peer.wire.reply_into(Flat(10), 1)
            else:
                peer.wire.replies(1)
        except TierUnavailable:
            assert not peer.wire.is_reusable
        else:
            assert peer.wire.is_reusable
        peer.close()


@pytest.mark.parametrize(
    "answer",
    [b"+OK\r\n", b"*0\r\n", b"*2\r\n", b"*-1\r\n", b"*1\r\n:1\r\n", b"*1\r\n$-2\r\n", b"*x\r\n", b"*1\r\n$1\r\nab\r\n"],
)
def test_a_reply_that_is_no_array_of_strings_closes_the_wire(peer: Peer, answer: bytes) -> None:
    peer.server.sendall(answer)
    peer.wire.send([command(b"X")], replies=1)

    with pytest.raises(TierUnavailable):
        peer.wire.reply_into(Flat(100), 1)

    assert not peer.wire.is_reusable


def test_an_error_in_place_of_a_page_is_a_value(peer: Peer) -> None:
    peer.server.sendall(b"-MOVED 5 h:1\r\n")
    peer.wire.send([command(b"X")], replies=1)

    assert isinstance(peer.wire.reply_into(Flat(100), 1), MovedError)
    assert peer.wire.is_reusable


def test_a_wire_that_is_owed_a_reply_is_not_reusable(peer: Peer) -> None:
    peer.wire.send([command(b"X")], replies=1)
    assert not peer.wire.is_reusable

    peer.server.sendall(b"+OK\r\n")
    peer.wire.replies(1)
    assert peer.wire.is_reusable


def test_buffers_larger_than_the_socket_takes_at_once_arrive_in_order(peer: Peer) -> None:
    big = memoryview(bytes(range(256)) * 20_000)
    received = bytearray()

    def serve() -> None:
        while len(received) < len(big) + 9:
            received.extend(peer.server.recv(1 << 20))
        peer.server.sendall(b"+OK\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    peer.wire.send([b"head", b"", big, b"tail\n"], replies=1)
    replies = peer.wire.replies(1)
    thread.join()

    assert replies == [b"OK"]
    assert received == b"head" + bytes(big) + b"tail\n"


def test_a_silent_server_is_unavailable_at_the_deadline() -> None:
    peer = Peer(timeout_s=0.05)

    with pytest.raises(TierUnavailable, match="no answer in time"):
        peer.wire.ask([(b"X",)])

    assert not peer.wire.is_reusable
    peer.close()


def test_a_server_that_takes_nothing_is_unavailable_at_the_deadline() -> None:
    peer = Peer(timeout_s=0.05)

    with pytest.raises(TierUnavailable, match="no answer in time"):
        peer.wire.send([bytes(64 << 20)], replies=1)

    peer.close()


def test_no_time_left_is_unavailable_before_anything_is_sent(peer: Peer) -> None:
    assert peer.wire.resume(time.monotonic() - 1)

    with pytest.raises(TierUnavailable, match="no answer in time"):
        peer.wire.ask([(b"X",)])

    assert peer.server.recv(1) == b""  # the wire was closed, and nothing had been sent


@pytest.mark.parametrize("unasked", [b"", b"+SURPRISE\r\n"], ids=["hung up", "unasked reply"])
def test_an_idle_wire_that_has_something_to_read_is_not_resumed(peer: Peer, unasked: bytes) -> None:
    assert peer.wire.resume(time.monotonic() + 10)

    if unasked:
        peer.server.sendall(unasked)
    else:
        peer.server.shutdown(socket.SHUT_WR)

    assert not peer.wire.resume(time.monotonic() + 10)


def test_a_wire_is_closed_twice_and_then_unavailable(peer: Peer) -> None:
    peer.wire.close()
    peer.wire.close()

    with pytest.raises(TierUnavailable):
        peer.wire.ask([(b"X",)])
