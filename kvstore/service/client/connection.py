"""One connection to a daemon, as a client has it: a call goes out, its answer comes back, or a deadline passes.

Blocking, for one thread at a time. After any error the connection is of no more use: an answer that comes late must not
be taken for that of the next call. A forked child has none: those it was forked with are its parent's, and must end
with it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import ssl
import struct
import time
import weakref
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from kvstore.errors import ConfigError
from kvstore.service.protocol import frames
from kvstore.service.protocol.batches import LOW_WATER_BYTES
from kvstore.service.protocol.frames import HEADER, Frame, Op, ProtocolError, Status

MAX_HTTP_BYTES = 16_384  # of headers
MAX_DESCRIPTORS = 2  # the slab's, and that of staging
RECEIVE_BYTES = 64 << 10  # most answers come whole in one call

Dial = Callable[[float], "Wire"]


class Wire:
    """A connected socket that frames go over. One thread at a time."""

    __slots__ = ("__weakref__", "_low_water", "_sequence", "_until", "is_local", "socket")

    def __init__(self, connected: socket.socket, *, is_local: bool = True) -> None:
        self.socket = connected
        self.is_local = is_local  # a unix socket, over which the slab's descriptor comes
        self._until = 0.0
        self._sequence = 0
        self._low_water = 1
        _wires.add(self)

    def call(self, op: Op, body: bytes, timeout_s: float) -> tuple[Status, bytes]:
        """Send a message and return its answer. Raises OSError (TimeoutError after `timeout_s`) or ProtocolError."""
        until = time.monotonic() + timeout_s
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.socket.settimeout(timeout_s)
        self.socket.sendall(frames.encode_frame(op, body, self._sequence))
        data = self._receive(until)
        frame = self._header(op, data)
        return frame.status, self._rest(data, frame, until)

    def hello(self, body: bytes, timeout_s: float, *, op: Op = Op.HELLO) -> tuple[Status, bytes, list[int]]:
        """Say hello over a unix socket; the answer, and descriptors of memory, which are the caller's to close.

        op: ATTACH for a further anchor of a session, which asks for the slab, too.
        """
        until = time.monotonic() + timeout_s
        self._sequence += 1
        self.socket.settimeout(timeout_s)
        self.socket.sendall(frames.encode_frame(op, body, self._sequence))
        fds = array.array("i")
        data, ancillary = self._receive_message(MAX_DESCRIPTORS * fds.itemsize)
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        try:
            for fd in fds:
                os.set_inheritable(fd, False)
            received = bytearray(data)
            if not received:
                raise ConnectionResetError("the daemon closed the connection")
            frame = self._header(op, received if len(received) >= HEADER.size else self._more(received, until))
            return frame.status, self._rest(received, frame, until), list(fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    # ---- batches of pages: frames that are sent and received piece by piece ----------------------------------------

    def begin(self, timeout_s: float) -> None:
        """Give the transfers that follow, until the next call, so much time."""
        self._until = time.monotonic() + timeout_s

    def send(self, op: Op, num_bytes: int, parts: Iterable[bytes | memoryview]) -> None:
        """Send a frame with a body of `num_bytes` from where its parts lie. Its answer is taken by `take`."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = HEADER.pack(frames.MAGIC, frames.VERSION, op, Status.OK, num_bytes, self._sequence)
        for part in parts:
            self.socket.settimeout(self._left_s(self._until))
            self.socket.sendall(header + part if header else part)
            header = b""

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        data = bytearray(num_bytes)
        self.take_into(memoryview(data), 0)
        return bytes(data)

    def take_into(self, view: memoryview, num_following: int) -> None:
        """Receive exactly this many bytes into where they belong. num_following: bytes that will come for certain."""
        at = 0
        while at < len(view):
            self._wait_for(min(LOW_WATER_BYTES, len(view) - at + num_following) if num_following else 1)
            self.socket.settimeout(self._left_s(self._until))
            received = self.socket.recv_into(view[at:])
            if not received:
                raise ConnectionResetError("the daemon closed the connection")
            at += received

    @property
    def is_lost(self) -> bool:
        """True if the other side has hung up. Does not wait."""
        try:
            self.socket.settimeout(0)
            if isinstance(self.socket, ssl.SSLSocket):  # which cannot peek; nothing is ever sent on an idle connection
                return self.socket.recv(1) == b""
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            return True

    def interrupt(self) -> None:
        """End what another thread waits for on this connection, now or next. Any thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # past TLS, whose state is the other thread's

    def close(self) -> None:
        """Hang up. Idempotent."""
        with contextlib.suppress(OSError):
            self.socket.close()

    def _wait_for(self, num_bytes: int) -> None:
        """Have the socket count as readable once it has so many bytes."""
        if num_bytes != self._low_water and not isinstance(self.socket, ssl.SSLSocket):  # which reads ahead
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self._low_water = num_bytes

    def _header(self, op: Op, data: bytearray) -> Frame:
        frame = frames.decode_header(memoryview(data)[: HEADER.size])
        if (frame.op, frame.sequence) != (op, self._sequence) and frame.status is not Status.ERROR:
            raise ProtocolError(f"asked {op.name} {self._sequence}, answered {frame.op.name} {frame.sequence}")
        return frame

    def _rest(self, data: bytearray, frame: Frame, until: float) -> bytes:
        end = HEADER.size + frame.num_bytes
        while len(data) < end:
            data += self._some(until)
        if len(data) > end:
            raise ProtocolError(f"answer of {frame.num_bytes} bytes is followed by {len(data) - end} more")
        return bytes(memoryview(data)[HEADER.size :])

    def _receive(self, until: float) -> bytearray:
        return self._more(bytearray(), until)

    def _more(self, data: bytearray, until: float) -> bytearray:
        while len(data) < HEADER.size:
            data += self._some(until)
        return data

    def _receive_message(self, item_bytes: int) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        if not self.is_local:  # TLS has no recvmsg
            return self.socket.recv(RECEIVE_BYTES), []
        data, ancillary, _, _ = self.socket.recvmsg(RECEIVE_BYTES, socket.CMSG_SPACE(item_bytes))
        return data, ancillary

    def _left_s(self, until: float) -> float:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        return left_s

    def _some(self, until: float) -> bytes:
        self.socket.settimeout(self._left_s(until))
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        return data


def dial_unix(path: str) -> Dial:
    """How to reach a daemon by its socket."""

    def dial(timeout_s: float) -> Wire:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            connected.connect(path)
            _check_peer(connected, path)
        except BaseException:
            connected.close()
            raise
        return Wire(connected)

    return dial


def dial_http(host: str, port: int, *, context: ssl.SSLContext | None = None, token: str | None = None) -> Dial:
    """How to reach a daemon on another machine: by its HTTP port, which turns the connection over to frames."""
    name = f"[{host}]" if ":" in host else host
    lines = [
        "GET /v1/channel HTTP/1.1",
        f"Host: {name}:{port}",
        "Connection: Upgrade",
        "Upgrade: kvstore/1",
        *([] if token is None else [f"Authorization: Bearer {token}"]),
    ]
    request = ("\r\n".join(lines) + "\r\n\r\n").encode()

    def dial(timeout_s: float) -> Wire:
        until = time.monotonic() + timeout_s
        connected = socket.create_connection((host, port), timeout_s)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                connected = context.wrap_socket(connected, server_hostname=host)
            connected.sendall(request)
            _check_upgraded(connected, until)
        except BaseException:
            connected.close()
            raise
        return Wire(connected, is_local=False)

    return dial


def _check_upgraded(connected: socket.socket, until: float) -> None:
    """Read the answer to the upgrade, and not a byte more. Raises ConfigError if the token is refused."""
    answer = bytearray()
    while not answer.endswith(b"\r\n\r\n"):
        connected.settimeout(max(0.001, until - time.monotonic()))
        byte = connected.recv(1)
        if not byte or len(answer) > MAX_HTTP_BYTES:
            raise ConnectionResetError("the daemon did not upgrade the connection")
        answer += byte
    status = answer.split(b" ", 2)[1:2]
    if status in ([b"401"], [b"403"]):
        raise ConfigError("service.token is refused by the daemon")
    if status != [b"101"]:
        raise ConnectionResetError(f"the daemon answered {bytes(answer[:80])!r}")


def unix_path(url: str) -> str | None:
    """The path of a unix:// URL; None for another."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else None


def _check_peer(connected: socket.socket, path: str) -> None:
    # Somebody else may have put a socket where ours is expected; prompts and their KV must not go there.
    form = struct.Struct("3i")
    _, uid, _ = form.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
    if uid not in (0, os.getuid()):
        raise ConfigError(f"service.url is unix://{path}, but user {uid} listens there; use a path of your own")


_wires: weakref.WeakSet[Wire] = weakref.WeakSet()


def _after_fork() -> None:
    for wire in list(_wires):
        wire.close()


os.register_at_fork(after_in_child=_after_fork)
