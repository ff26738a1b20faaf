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
import struct
import time
import weakref
from collections.abc import Callable
from urllib.parse import urlsplit

from kvstore.errors import ConfigError
from kvstore.service.protocol import frames
from kvstore.service.protocol.frames import HEADER, Frame, Kind, ProtocolError, ReplyStatus

MAX_DESCRIPTORS = 2  # the slab's, and that of staging
RECEIVE_BYTES = 64 << 10  # most answers come whole in one call

Dial = Callable[[float], "DaemonConnection"]


class DaemonConnection:
    """A connected socket that frames go over. One thread at a time."""

    __slots__ = ("__weakref__", "_sequence", "socket")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._sequence = 0
        _wires.add(self)

    def call(self, kind: Kind, body: bytes, timeout_s: float) -> tuple[ReplyStatus, bytes]:
        """Send a message and return its answer. Raises OSError (TimeoutError after `timeout_s`) or ProtocolError."""
        until = time.monotonic() + timeout_s
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.socket.settimeout(timeout_s)
        self.socket.sendall(frames.encode_frame(kind, body, self._sequence))
        data = self._receive(until)
        frame = self._header(kind, data)
        return frame.status, self._rest(data, frame, until)

    def hello(self, body: bytes, timeout_s: float, *, kind: Kind = Kind.HELLO) -> tuple[ReplyStatus, bytes, list[int]]:
        """Say hello; the answer, and descriptors of memory, which are the caller's to close.

        kind: ATTACH for a further anchor of a session, which asks for the slab, too.
        """
        until = time.monotonic() + timeout_s
        self._sequence += 1
        self.socket.settimeout(timeout_s)
        self.socket.sendall(frames.encode_frame(kind, body, self._sequence))
        fds = array.array("i")
        data, ancillary, _, _ = self.socket.recvmsg(RECEIVE_BYTES, socket.CMSG_SPACE(MAX_DESCRIPTORS * fds.itemsize))
        for level, number, raw in ancillary:
            if level == socket.SOL_SOCKET and number == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        try:
            for fd in fds:
                os.set_inheritable(fd, False)
            received = bytearray(data)
            if not received:
                raise ConnectionResetError("the daemon closed the connection")
            frame = self._header(kind, received if len(received) >= HEADER.size else self._more(received, until))
            return frame.status, self._rest(received, frame, until), list(fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    @property
    def is_lost(self) -> bool:
        """True if the other side has hung up. Does not wait."""
        try:
            self.socket.settimeout(0)
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def interrupt(self) -> None:
        """End what another thread waits for on this connection, now or next. Any thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up. Idempotent."""
        with contextlib.suppress(OSError):
            self.socket.close()

    def _header(self, kind: Kind, data: bytearray) -> Frame:
        frame = frames.decode_header(memoryview(data)[: HEADER.size])
        if (frame.kind, frame.sequence) != (kind, self._sequence) and frame.status is not ReplyStatus.ERROR:
            raise ProtocolError(f"asked {kind.name} {self._sequence}, answered {frame.kind.name} {frame.sequence}")
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

    def dial(timeout_s: float) -> DaemonConnection:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(timeout_s)
            connected.connect(path)
            _check_peer(connected, path)
        except BaseException:
            connected.close()
            raise
        return DaemonConnection(connected)

    return dial


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


_wires: weakref.WeakSet[DaemonConnection] = weakref.WeakSet()


def _after_fork() -> None:
    for wire in list(_wires):
        wire.close()


os.register_at_fork(after_in_child=_after_fork)
