"""A proxy that forgets connections as NAT does: what comes later is dropped, with no FIN and no RST."""

from __future__ import annotations

import socket
from contextlib import suppress

from tests.helpers.proxy import Proxy


class Nat(Proxy):
    """num_connections: connections accepted so far."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.num_connections = 0
        self._known: set[socket.socket] = set()

    def forget(self) -> None:
        """Drop whatever comes on the connections that there are."""
        self._known.clear()

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        self.num_connections += 1
        self._known.add(client)
        with suppress(OSError):
            while data := client.recv(65536):
                if client in self._known:
                    server.sendall(data)
        self._close(server)

    def _pass_chunk(self, data: bytes, client: socket.socket) -> bool:
        return super()._pass_chunk(data, client) if client in self._known else True
