"""Frames and HTTP over one unix socket."""

import socket
from pathlib import Path

import pytest

from kvstore.service.daemon import listener
from kvstore.service.dashboard.client import DashboardClient
from tests.helpers.daemons import attach, local_daemon
from tests.helpers.stores import prompt, use


def talk(path: Path, *pieces: bytes) -> bytes:
    """What the daemon says to bytes that come piece by piece, until it hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10.0)
        connection.connect(str(path))
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_a_request_is_answered_on_the_socket_that_clients_use_without_a_port(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock") as daemon, attach(tmp_path / "kv.sock") as store:
        use(store, prompt(2))
        daemon.look(lambda d: d.dashboard.sample())

        now = DashboardClient(f"unix://{tmp_path / 'kv.sock'}").get("now")

        assert now["num_clients"] == 1
        assert now["is_operator"]


def test_the_first_bytes_may_come_one_by_one(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock"):
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

        answer = talk(tmp_path / "kv.sock", *(request[i : i + 1] for i in range(6)), request[6:])

        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b'{"status":"ok"}')


def test_what_is_neither_is_refused_as_a_frame(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock"):
        answer = talk(tmp_path / "kv.sock", b"HELO there, this is mail\r\n" * 3)

        assert answer
        assert not answer.startswith(b"HTTP")


def test_a_foreign_host_is_refused_there_too(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock"):
        answer = talk(tmp_path / "kv.sock", b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")

        assert answer.startswith(b"HTTP/1.1 400")


def test_a_request_that_comes_too_early_is_hung_up_on(tmp_path: Path) -> None:
    with local_daemon(tmp_path / "kv.sock") as daemon:
        daemon.call(daemon.daemon.app.close())

        assert talk(tmp_path / "kv.sock", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""


def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HELLO_TIMEOUT_S", 0.05)
    with local_daemon(tmp_path / "kv.sock"):
        assert talk(tmp_path / "kv.sock") == b""
