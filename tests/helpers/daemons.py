"""Daemons for tests: one in a thread of this process with a loop of its own, or one in a process that can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from kvstore.config.sections import Config
from kvstore.service.client.connect import connect
from kvstore.service.client.connection import DaemonConnection
from kvstore.service.client.store import RemoteStore
from kvstore.service.daemon.daemon import Daemon
from kvstore.service.protocol.frames import Kind
from tests.helpers.stores import LAYOUT, PAGE_BYTES, PATIENCE, namespace
from tests.helpers.waiting import WAIT_S, wait_until

T = TypeVar("T")
CALL_TIMEOUT_S = 10.0  # a busy machine; a test in which a daemon does not answer says less
START_S = WAIT_S  # for a daemon to start
SEEKER = "kvstore-seeker"  # the thread of a client that looks for its daemon


def daemon_config(socket: Path, disk: Path | None = None, /, **sections: Any) -> Config:
    """64 host slots and, where asked for, 128 pages of disk."""
    values: dict[str, Any] = {
        "host": {"capacity_bytes": 64 * PAGE_BYTES, "huge_pages": False},
        "service": {"socket": socket, "http_port": None},
        "store": PATIENCE,
    }
    if disk is not None:
        values["disk"] = {"path": disk, "capacity_bytes": 128 * PAGE_BYTES, "workers": 2}
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields}
    return Config(**values)


class LocalDaemon:
    """A daemon in a thread of this process, whose inside a test can look at."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.daemon = Daemon(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="test-daemon", daemon=True)
        self._thread.start()
        try:
            self.call(self.daemon.start())
        except BaseException:
            self.stop()
            raise

    def call(self, work: Any) -> Any:
        """Run a coroutine in the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def look(self, read: Callable[[Daemon], T]) -> T:
        """Read something of the daemon, in its loop."""

        async def reading() -> T:
            return read(self.daemon)

        result: T = self.call(reading())
        return result

    def stop(self) -> None:
        """Drain and close. Idempotent."""
        if self._thread.is_alive():
            self.call(self.daemon.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


class Http:
    """A client of the HTTP API that hides nothing."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self.token = token

    def call(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status, and the body: parsed if it is JSON. body: bytes as they are, anything else as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            sent = dict(headers or {})
            if self.token is not None:
                sent.setdefault("Authorization", f"Bearer {self.token}")
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            raw = answer.read()
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.status, json.loads(raw) if is_json else raw
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The body of a GET that must succeed."""
        status, body = self.call("GET", path)
        assert status == 200, body
        return body

    def post(self, path: str, **fields: Any) -> Any:
        """The body of a POST that must succeed."""
        status, body = self.call("POST", path, fields)
        assert status == 200, body
        return body


@contextmanager
def local_daemon(socket: Path, disk: Path | None = None, /, **sections: Any) -> Iterator[LocalDaemon]:
    """A daemon in this process for the length of a block."""
    daemon = LocalDaemon(daemon_config(socket, disk, **sections))
    try:
        yield daemon
    finally:
        daemon.stop()


class DaemonProcess:
    """`kvstore serve` in a process of its own."""

    def __init__(self, socket: Path, disk: Path | None = None, *settings: str, host_pages: int = 64) -> None:
        self.socket = socket
        self.settings = [
            f"host.capacity_bytes={host_pages * PAGE_BYTES}",
            "host.huge_pages=false",
            "service.http_port=none",
            *(f"store.{name}={value}" for name, value in PATIENCE.items()),
            *([] if disk is None else [f"disk.path={disk}", f"disk.capacity_bytes={128 * PAGE_BYTES}"]),
            *settings,
        ]
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "kvstore", "serve", "-v", "--socket", str(self.socket)]
        for setting in self.settings:
            command += ["--set", setting]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        wait_until(self._listens, f"the daemon ended with {self.process.poll()}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(WAIT_S)

    def terminate(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}")
        import socket

        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """The messages that clients in this process send meanwhile, by the thread that waits for the answer."""
    counted: Counter[str] = Counter()
    call, hello = DaemonConnection.call, DaemonConnection.hello

    def counting(self: DaemonConnection, kind: Kind, body: bytes, timeout_s: float) -> Any:
        counted[threading.current_thread().name] += 1
        return call(self, kind, body, timeout_s)

    def counting_hello(self: DaemonConnection, body: bytes, timeout_s: float, **named: Any) -> Any:
        counted[threading.current_thread().name] += 1
        return hello(self, body, timeout_s, **named)

    with patch.object(DaemonConnection, "call", counting), patch.object(DaemonConnection, "hello", counting_hello):
        yield counted


def attach(socket: Path, **options: Any) -> RemoteStore:
    """A client with the tests' layout and namespace."""
    return connect(f"unix://{socket}", LAYOUT, namespace(), **{"call_timeout_s": CALL_TIMEOUT_S, **options})
