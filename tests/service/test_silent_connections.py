"""Strangers that connect and say nothing, or next to nothing: whoever asks is answered, and engines notice nothing."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from kvstore.ports import free_port
from kvstore.web import server
from tests.helpers.daemons import START_S, Http, LocalDaemon, attach, local_daemon, wait_until
from tests.helpers.odd_requests import talk
from tests.helpers.stores import PAGE_BYTES, load, prompt, save

FILES = 256


def knock(stack: ExitStack, port: int, say: bytes = b"") -> socket.socket:
    """One more connection, that says no more than this."""
    stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
    stranger.sendall(say)
    return stranger


@contextmanager
def few_files(socket_path: Path, log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A daemon that may have FILES files open, and its port."""
    port = free_port()
    settings = [
        f"service.http_port={port}",
        f"service.socket={socket_path}",
        f"host.capacity_bytes={64 * PAGE_BYTES}",
        "host.huge_pages=false",
    ]
    command = [sys.executable, "-m", "kvstore", "serve", *(word for one in settings for word in ("--set", one))]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
        )
    try:
        wait_until(lambda: process.poll() is not None or b"200" in probe(socket_path), timeout_s=2 * START_S)
        yield port, process
    finally:
        process.kill()
        process.wait()


def probe(address: Path | int, path: str = "/readyz") -> bytes:
    """The head of the answer to a probe; nothing if there is none."""
    try:
        return talk(address, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())[:64]
    except OSError:
        return b""


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(300)
def test_more_silent_connections_than_there_are_descriptors_lock_nobody_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with few_files(tmp_path / "kv.sock", log) as (port, process), ExitStack() as stack:
        engine = stack.enter_context(attach(tmp_path / "kv.sock", call_timeout_s=20.0))
        save(engine, engine.request(prompt(5)))
        before = cpu_s(process.pid)
        for number in range(2 * FILES):
            knock(stack, port, b"" if number % 2 else b"GET /metrics HTTP/1.1\r\nHost: loc")
            if number % 64 == 0:
                assert b"200 OK" in probe(port, "/healthz")
                assert b"200 OK" in probe(port, "/metrics")
                assert load(engine, engine.request(prompt(5)))[0] == 5

        for _ in range(20):  # new ones by the socket that engines use
            with attach(tmp_path / "kv.sock", call_timeout_s=20.0) as other:
                assert load(other, other.request(prompt(5)))[0] == 5
        assert b"200 OK" in probe(port, "/healthz")
        assert cpu_s(process.pid) - before < 10  # it burned a core for as long as descriptors were missing

    assert log.stat().st_size < 64 << 10


@pytest.mark.timeout(300)
def test_silent_connections_on_the_unix_socket_make_room_as_well(tmp_path: Path) -> None:
    with few_files(tmp_path / "kv.sock", tmp_path / "log"), ExitStack() as stack:
        for _ in range(2 * FILES):
            stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
            stranger.settimeout(10)
            stranger.connect(str(tmp_path / "kv.sock"))

        with attach(tmp_path / "kv.sock", call_timeout_s=20.0) as engine:
            save(engine, engine.request(prompt(5)))
            assert load(engine, engine.request(prompt(5)))[0] == 5


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalDaemon]:
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    monkeypatch.setattr(server, "IDLE_S", 0.6)
    monkeypatch.setattr(server, "STALL_S", 0.5)
    monkeypatch.setattr("kvstore.web.bodies.TIMEOUT_S", 0.5)
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}) as daemon:
        yield daemon


def is_hung_up(stranger: socket.socket) -> bool:
    """Whether the other side has ended the connection."""
    stranger.settimeout(10)
    try:
        while stranger.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("say", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(daemon: LocalDaemon, say: bytes) -> None:
    with ExitStack() as stack:
        assert is_hung_up(knock(stack, daemon.daemon.app.port, say))


def test_a_head_that_comes_byte_by_byte_has_no_more_time_than_another(daemon: LocalDaemon) -> None:
    with ExitStack() as stack:
        stranger = knock(stack, daemon.daemon.app.port)

        def is_refused() -> bool:
            with suppress(ConnectionError):
                stranger.sendall(b"G")
                return False
            return True

        wait_until(is_refused)


def test_a_connection_that_asks_nothing_more_is_ended(daemon: LocalDaemon) -> None:
    with ExitStack() as stack:
        stranger = knock(stack, daemon.daemon.app.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")

        assert is_hung_up(stranger)


def test_a_body_that_does_not_come_is_refused(daemon: LocalDaemon) -> None:
    head = (
        b"POST /v1/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )

    assert talk(daemon.daemon.app.port, head, patience_s=20.0).startswith(b"HTTP/1.1 408")


def test_whoever_takes_nothing_of_its_answers_is_ended(daemon: LocalDaemon) -> None:
    with ExitStack() as stack:
        stranger = knock(stack, daemon.daemon.app.port)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stranger.setblocking(False)
        request = b"GET /v1/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"

        def is_ended() -> bool:
            with suppress(OSError):
                stranger.send(request * 100)
            return not len(daemon.daemon.app.connections)

        wait_until(is_ended)


def test_what_is_answered_slowly_is_not_taken_for_silence(daemon: LocalDaemon) -> None:
    events = b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ExitStack() as stack:
        listener = knock(stack, daemon.daemon.app.port, events)
        listener.recv(4096)

        time.sleep(2 * server.IDLE_S)

        assert daemon.look(lambda d: d.events.num_streams) == 1
        assert Http(daemon.daemon.app.port).get("/healthz") == {"status": "ok"}
