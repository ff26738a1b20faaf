"""A private redis-server for the demo, the tests and the benchmarks.

It listens on a free port of 127.0.0.1 and on a unix socket, keeps nothing on disk, and is gone when the `with` block
ends. Before it is used it is asked for its process id, so that somebody else's server is never taken for it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.errors import KVStoreError
from kvstore.ports import free_port

BINARY_VARIABLE = "KVSTORE_REDIS_SERVER"
HOST = "127.0.0.1"
MiB = 1 << 20
UNREAD_BYTES = 64 * MiB  # of replies that wait for one client; above any page, and its connection is not closed
_PORT_TRIES = 5
_LOG_LINES = 5


class RedisNotInstalled(KVStoreError):
    """There is no redis-server binary. The message says how to get one."""


class RedisDidNotStart(KVStoreError):
    """The server ended or did not answer in time. The message has its last words."""


def find_redis_server() -> str:
    """The path of redis-server: $KVSTORE_REDIS_SERVER, or from PATH. Raises RedisNotInstalled."""
    named = os.environ.get(BINARY_VARIABLE)
    found = shutil.which(named) if named else shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        missing = f"{BINARY_VARIABLE}={named} is not a program" if named else "redis-server is not on PATH"
        raise RedisNotInstalled(
            f"{missing}; install it with `apt-get install redis-server` (Debian, Ubuntu), `dnf install redis` (Fedora) "
            f"or `brew install redis` (macOS), or set {BINARY_VARIABLE} to the binary"
        )
    return found


def memory_options(maxmemory_bytes: int, policy: str) -> list[str]:
    """Options of redis-server: what it may hold, what leaves when that is full, and what one client may leave unread.

    Replies that wait count as memory, so a client that does not read costs a small server its pages. (The limit of one
    client is known to every version; `maxmemory-clients`, for all together, only to Redis 7.0 and later.)
    """
    unread = max(UNREAD_BYTES, maxmemory_bytes // 5)
    options = ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", policy]
    return [*options, "--client-output-buffer-limit", "normal", str(unread), "0", "0"]


class LocalRedis:
    """One private server, from `start` (or `with`) to `stop`. Not thread-safe.

    with LocalRedis(maxmemory_bytes=256 << 20) as server:
        tier = RedisTier(server.url, ...)
    """

    def __init__(
        self,
        *,
        maxmemory_bytes: int = 256 * MiB,
        policy: str = "allkeys-lfu",
        password: str | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        arguments: Sequence[str] = (),
        binary: str | None = None,
        start_timeout_s: float = 10.0,
    ) -> None:
        """Starts nothing yet.

        maxmemory_bytes, policy: what the server may hold, and what leaves when that is full. A burst of saves turns a
            small memory over within a second, which is the tick of LRU's clock: then LRU is random (docs/redis.md).
        tls_cert, tls_key: with these the port speaks TLS only; clients need no certificate of their own.
        arguments: more options of redis-server, such as ("--cluster-enabled", "yes").
        binary: of the server; None for what `find_redis_server` finds.

        Raises RedisNotInstalled.
        """
        self._binary = binary or find_redis_server()
        self._maxmemory_bytes = maxmemory_bytes
        self._policy = policy
        self._password = password
        self._tls_cert = tls_cert
        self._tls_key = tls_key
        self.arguments = tuple(arguments)
        self._start_timeout_s = start_timeout_s
        self._pid = os.getpid()  # a forked child that exits must not end its parent's server
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self.port = 0

    def start(self) -> None:
        """Start the server and wait until it answers; after `kill` or `stop`, on the same port. RedisDidNotStart."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="kv-redis-"))
            atexit.register(self.stop)
        tries = 1 if self.port else _PORT_TRIES
        for attempt in range(tries):
            port = self.port or free_port()
            self._process = self._spawn(port)
            if self._answers(port):
                self.port = port
                return
            # Somebody may have taken the port between our look and the server's; another one will do.
            self._reap()
            if attempt + 1 == tries:
                words = self._last_words()
                self.stop()
                raise RedisDidNotStart(f"redis-server on port {port} did not start: {words}")

    def stop(self) -> None:
        """End the server and remove its directory. Idempotent; nothing in a process that did not start it."""
        if self._pid != os.getpid():
            return
        self._reap()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
            atexit.unregister(self.stop)

    def kill(self) -> None:
        """End the server at once, as a crash does; `start` brings it back, empty."""
        self._signal(signal.SIGKILL)
        self._reap()

    def freeze(self) -> None:
        """Stop the server from running: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)  # the signal takes effect some time after it is sent

    def thaw(self) -> None:
        """Continue a frozen server."""
        self._signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """A plain redis-py client, for looking at the server past the code under test. The caller closes it."""
        return self._client(self.port)

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @property
    def url(self) -> str:
        """URL of the TCP port."""
        scheme = "redis" if self._tls_cert is None else "rediss"
        query = "" if self._tls_cert is None else f"?ssl_ca_certs={quote(str(self._tls_cert))}"
        return f"{scheme}://{self._userinfo}{HOST}:{self.port}/0{query}"

    @property
    def unix_url(self) -> str:
        """URL of the unix socket, which costs about half the CPU of TCP."""
        return f"unix://{self._userinfo}{quote(str(self._socket_path))}?db=0"

    def __enter__(self) -> LocalRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- private

    def _spawn(self, port: int) -> subprocess.Popen[bytes]:
        assert self._directory is not None
        options: list[str] = ["--bind", HOST, "--unixsocket", str(self._socket_path), "--unixsocketperm", "700"]
        options += ["--port", str(port)] if self._tls_cert is None else ["--port", "0", "--tls-port", str(port)]
        if self._tls_cert is not None:
            options += ["--tls-cert-file", str(self._tls_cert), "--tls-key-file", str(self._tls_key)]
            options += ["--tls-ca-cert-file", str(self._tls_cert), "--tls-auth-clients", "no"]
        if self._password is not None:
            options += ["--requirepass", self._password]
        options += ["--dir", str(self._directory), "--save", "", "--appendonly", "no", "--daemonize", "no"]
        options += memory_options(self._maxmemory_bytes, self._policy)
        with open(self._directory / "log", "ab") as log:
            return subprocess.Popen(
                [self._binary, *options, *self.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _answers(self, port: int) -> bool:
        assert self._process is not None
        until = time.monotonic() + self._start_timeout_s
        client = self._client(port)
        try:
            while time.monotonic() < until and self._process.poll() is None:
                with suppress(redis.exceptions.RedisError):
                    info: Any = client.info("server")
                    if info["process_id"] == self._process.pid:
                        return True
                time.sleep(0.02)
        finally:
            client.close()
        return False

    def _client(self, port: int) -> redis.Redis:
        options: dict[str, Any] = {"password": self._password, "protocol": 2, "socket_timeout": self._start_timeout_s}
        if self._tls_cert is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(self._tls_cert)}
        return redis.Redis(HOST, port, retry=Retry(NoBackoff(), 0), **options)

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # A frozen process takes SIGTERM only once it runs again; nothing is on disk, so the hard way is as good.
        process.kill()
        process.wait()

    def _signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _last_words(self) -> str:
        assert self._directory is not None
        lines = (self._directory / "log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-_LOG_LINES:]) or "it said nothing"

    @property
    def _socket_path(self) -> Path:
        if self._directory is None:
            raise RuntimeError("the server has not been started")
        return self._directory / "socket"

    @property
    def _userinfo(self) -> str:
        return "" if self._password is None else f":{quote(self._password, safe='')}@"
