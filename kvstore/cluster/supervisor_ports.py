"""Questions of a supervisor about ports: which process has them, and does it answer."""

from __future__ import annotations

import socket
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

import psutil

from kvstore.cluster.topology import HOST

ASK_TIMEOUT_S = 2.0
COMMAND_CHARACTERS = 80


def holder(port: int) -> str | None:
    """The process that has a port of this machine, in words; None if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
        try:
            probe.bind((HOST, port))
            return None
        except OSError as error:
            reason = error.strerror or str(error)
    with suppress(psutil.Error):  # other users' processes, for some systems and users
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid}: {command[:COMMAND_CHARACTERS]}"
    return f"a process that this user cannot see ({reason})"


def is_ready(port: int) -> bool:
    """Whether GET /readyz answers 200 there."""
    connection = HTTPConnection(HOST, port, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def redis_is_ready(port: int) -> bool:
    """Whether a Redis server answers PING there."""
    try:
        with socket.create_connection((HOST, port), timeout=ASK_TIMEOUT_S) as server:
            server.sendall(b"PING\r\n")
            return server.recv(16).startswith(b"+PONG")
    except OSError:
        return False
