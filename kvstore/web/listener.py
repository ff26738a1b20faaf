"""A socket that listens, and what happens when there is no descriptor for whoever knocks.

asyncio's own accept tries, and logs, as often as the backlog is long for every connection that waits. Here one failure
is one rate-limited line and a short pause, after something that matters less was ended to make room.

The event loop only.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from kvstore import logs
from kvstore.web.connections import Connection, Connections
from kvstore.web.descriptors import OUT_OF_THEM

log = logs.limited(__name__)

ACCEPTS_AT_ONCE = 32  # then others of the loop have their turn
PAUSE_S = 0.1  # without accepting, when no descriptor could be had
HANDSHAKE_S = 10.0


class Listener:
    """Accepts connections and gives each a protocol.

    make:     the protocol of a connection; None refuses it.
    make_way: called when descriptors have run out; True if one is free now. After False it is tried again in a while.
    """

    def __init__(
        self,
        name: str,
        raw: socket.socket,
        connections: Connections,
        make: Callable[[Connection], asyncio.BaseProtocol | None],
        *,
        tls: ssl.SSLContext | None = None,
        make_way: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.num_starved = 0
        self._socket = raw
        self._connections = connections
        self._make = make
        self._tls = tls
        self._make_way = make_way
        self._tasks: set[asyncio.Task[bool]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def start(self) -> None:
        """Accept from now on. The socket listens already."""
        self._socket.setblocking(False)
        self._go_on()

    def close(self) -> None:
        """Accept no more; what was accepted goes on. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        for task in self._tasks:
            task.cancel()

    # ---- private ------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._timer = None
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                raw, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.num_starved += 1
                if error.errno in OUT_OF_THEM:
                    log.warning("%s: no descriptor is left for a new connection: %s", self.name, error.strerror)
                    if self._make_way():
                        continue
                else:
                    log.warning("%s: a connection was not accepted: %s", self.name, error.strerror)
                self._pause()
                return
            raw.setblocking(False)
            self._take(raw, address[0] if isinstance(address, tuple) else self.name)

    def _pause(self) -> None:
        """The kernel would wake the loop again at once, and for nothing."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._timer = loop.call_later(PAUSE_S, self._go_on)

    def _take(self, raw: socket.socket, peer: str) -> None:
        connection = self._connections.enter(peer, raw.close)
        protocol = None if connection is None else self._make(connection)
        if connection is None or protocol is None:
            if connection is not None:
                connection.leave()
            raw.close()
            log.info("%s: a connection is refused, %d are open", self.name, len(self._connections))
            return
        handed: list[bool] = []
        task = asyncio.get_running_loop().create_task(self._connect(raw, handed, protocol))
        connection.drop = task.cancel  # until there is a transport: a TLS handshake may never end
        self._tasks.add(task)

        def ended(task: asyncio.Task[bool]) -> None:
            self._tasks.discard(task)
            if task.cancelled() or not task.result():
                connection.leave()
                if not handed:  # after that the socket is the transport's, which closes it in its own time
                    raw.close()

        task.add_done_callback(ended)

    async def _connect(self, raw: socket.socket, handed: list[bool], protocol: asyncio.BaseProtocol) -> bool:
        handed.append(True)
        loop = asyncio.get_running_loop()
        handshake_s = None if self._tls is None else HANDSHAKE_S
        try:
            await loop.connect_accepted_socket(
                lambda: protocol,
                raw,
                ssl=self._tls,
                ssl_handshake_timeout=handshake_s,
            )
        except (OSError, asyncio.TimeoutError) as error:
            log.info("%s: a connection was not made: %s", self.name, type(error).__name__)
            return False
        return True
