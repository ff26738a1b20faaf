"""The socket below one of the daemon's connections: what asyncio's transports leave undone.

Who is at the other end, noticing that it is gone, being woken for much instead of little, descriptors, and sending from
where bytes lie. Nothing here may overtake what the transport has not sent yet.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Sequence

_PEER = struct.Struct("3i")  # pid, uid, gid
# An anchor is silent for as long as its client lives, and a machine that loses power says no goodbye: without these,
# its session would last for ever. Seconds of silence, seconds between questions, questions.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class RawSocket:
    """The socket of a transport. The daemon's event loop only."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._has_tls = transport.get_extra_info("sslcontext") is not None
        self._low_water = 1

    @property
    def pid(self) -> int | None:
        """The process at the other end of a unix socket; None if it is of a container that this one cannot see into."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        return int(_PEER.unpack(raw)[0]) or None

    def notice_death(self) -> None:
        """Have the kernel end a TCP connection whose other machine is gone, after a minute."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def wait_for(self, num_bytes: int) -> None:
        """Have the loop be woken once so many bytes have come; TLS, which reads ahead, wakes it as before."""
        if num_bytes != self._low_water and not self._has_tls:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self._low_water = num_bytes

    def send_descriptors(self, data: bytes, fds: Sequence[int]) -> None:
        """Send the first bytes of a connection, and descriptors with them. Raises OSError if it cannot be at once."""
        if self._transport.get_write_buffer_size():
            raise BlockingIOError(errno.EAGAIN, "what was sent before is not taken")
        with self._duplicate() as raw:
            sent = socket.send_fds(raw, [data], list(fds))
        if sent < len(data):
            self._transport.write(data[sent:])

    def past_transport(self) -> socket.socket | None:
        """A socket for large sends, of which the transport would copy what has to wait; None where there must be none.

        The caller's to close.
        """
        if self._has_tls or self._transport.get_write_buffer_size():
            return None
        raw = self._duplicate()
        raw.setblocking(False)
        return raw

    def _duplicate(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._socket.fileno()))
