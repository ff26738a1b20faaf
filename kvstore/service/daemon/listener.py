"""The two protocols of the unix socket: frames (a client of the library), or HTTP (curl, `kvstore top`).

The first bytes tell: a frame begins with the protocol's magic, a request with the name of a method. Until they come,
nothing is made for the connection; one that says nothing is closed, and sooner if others need its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from kvstore.service.daemon.connection import HELLO_TIMEOUT_S
from kvstore.web.connections import Connection

METHODS = (b"GET ", b"POST", b"PUT ", b"HEAD", b"DELE", b"OPTI", b"PATC")


class Door(asyncio.Protocol):
    """Hands a connection over to whoever speaks its language. The daemon's event loop only."""

    def __init__(
        self,
        connection: Connection,
        frames: Callable[[], asyncio.BufferedProtocol],
        http: Callable[[Connection], asyncio.Protocol | None],
    ) -> None:
        self._connection = connection
        self._frames = frames
        self._http = http
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._first = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connection.drop = self._transport.abort
        self._timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.leave()
        self._stop()

    def data_received(self, data: bytes) -> None:
        self._first += data
        if len(self._first) < len(METHODS[0]) or self._transport is None:
            return
        transport, first = self._transport, self._first
        self._stop()
        if first[:4] in METHODS:
            http = self._http(self._connection)
            if http is None:  # the daemon is not up yet, or closing
                transport.abort()
                return
            transport.set_protocol(http)
            http.connection_made(transport)
            http.data_received(first)
            return
        self._connection.leave()  # from here on it is a client's, or is closed when it does not say whose
        frames = self._frames()
        transport.set_protocol(frames)
        frames.connection_made(transport)
        while first and not transport.is_closing():
            room = memoryview(frames.get_buffer(len(first)))
            taken = min(len(room), len(first))
            room[:taken] = first[:taken]
            first = first[taken:]
            frames.buffer_updated(taken)

    def _stop(self) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
