"""A TCP proxy that does to a server's replies what networks and dying servers do.

    with Proxy(server.port) as proxy:
        proxy.arm(Fault.CUT, after_bytes=1000)

Requests pass unharmed. The fault strikes once `after_bytes` bytes of replies, over all connections, have passed since
it was armed.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from enum import Enum

CHUNK_BYTES = 4096


class Fault(Enum):
    NONE = "none"
    CUT = "cut"  # close the connection
    STALL = "stall"  # pass nothing more, keep the connection open
    GARBLE = "garble"  # flip one bit, go on
    TRICKLE = "trickle"  # from there on one byte every 20 ms


class Proxy:
    """Forwards connections to 127.0.0.1:`target_port` until the `with` block ends."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._lock = threading.Lock()
        self._fault = Fault.NONE
        self._bytes_until_fault = 0
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def arm(self, fault: Fault, *, after_bytes: int = 0) -> None:
        """Let `fault` strike after that many more bytes of replies."""
        with self._lock:
            self._fault = fault
            self._bytes_until_fault = after_bytes

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._close(self._listener)
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            self._close(sock)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                self._close(client)
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            self._start(self._pass_requests, client, server)
            self._start(self._pass_replies, server, client)

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                server.sendall(data)
        except OSError:
            pass
        self._close(server)

    def _pass_replies(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(CHUNK_BYTES):
                if not self._pass_chunk(data, client):
                    break
        except OSError:
            pass
        self._close(client)
        self._close(server)

    def _pass_chunk(self, data: bytes, client: socket.socket) -> bool:
        with self._lock:
            fault, before = self._fault, min(self._bytes_until_fault, len(data))
            self._bytes_until_fault -= before
        if fault is Fault.NONE or before == len(data):
            client.sendall(data)
            return True
        client.sendall(data[:before])
        rest = data[before:]
        if fault is Fault.CUT:
            return False
        if fault is Fault.STALL:
            self._ended.wait()
            return False
        if fault is Fault.GARBLE:
            self.arm(Fault.NONE)
            client.sendall(bytes([rest[0] ^ 4]) + rest[1:])
            return True
        for i in range(len(rest)):
            if self._ended.wait(0.02):
                return False
            client.sendall(rest[i : i + 1])
        return True

    def _start(self, run: object, *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _close(sock: socket.socket) -> None:
        # shutdown wakes a thread that is blocked in recv or accept; close alone does not.
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
