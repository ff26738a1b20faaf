"""The socket below one of the daemon's connections: what asyncio's transports leave undone.

The process at the other end, and descriptors. Nothing here may overtake what the transport has not sent yet.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Sequence

_PEER = struct.Struct("3i")  # pid, uid, gid


class RawSocket:
    """The socket of a transport. The daemon's event loop only."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")

    @property
    def pid(self) -> int | None:
        """The process at the other end of a unix socket; None if it is of a container that this one cannot see into."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        return int(_PEER.unpack(raw)[0]) or None

    def send_descriptors(self, data: bytes, fds: Sequence[int]) -> None:
        """Send the first bytes of a connection, and descriptors with them. Raises OSError if it cannot be at once."""
        if self._transport.get_write_buffer_size():
            raise BlockingIOError(errno.EAGAIN, "what was sent before is not taken")
        with self._duplicate() as raw:
            sent = socket.send_fds(raw, [data], list(fds))
        if sent < len(data):
            self._transport.write(data[sent:])

    def _duplicate(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._socket.fileno()))
