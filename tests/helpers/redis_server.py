"""Redis servers for tests, beside `LocalRedis`: a certificate for TLS, a cluster, a sentinel, canned answers."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.ports import free_port
from kvstore.testing.redis_server import LocalRedis, RedisNotInstalled, find_redis_server
from tests.helpers.waiting import WAIT_S, wait_until

ALL_SLOTS = (0, 16383)


def _has_redis() -> bool:
    try:
        find_redis_server()
    except RedisNotInstalled:
        return False
    return True


# Put `pytestmark = NEEDS_REDIS` into a module, or decorate with each.
NEEDS_REDIS = [
    pytest.mark.redis,
    pytest.mark.skipif(not _has_redis(), reason="needs redis-server: apt-get install redis-server"),
]
NEEDS_OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-made certificate for 127.0.0.1 and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", *kind, *name, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    return cert, key


@contextmanager
def cluster_nodes(count: int) -> Iterator[list[LocalRedis]]:
    """Servers in cluster mode that know each other; the first has all slots."""
    nodes: list[LocalRedis] = []
    try:
        for _ in range(count):
            bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "2000")
            nodes.append(LocalRedis(arguments=bus))
            nodes[-1].start()
        command(nodes[0], "CLUSTER", "ADDSLOTSRANGE", *ALL_SLOTS)
        for node in nodes[1:]:
            bus_port = node.arguments[node.arguments.index("--cluster-port") + 1]
            command(nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus_port)
        wait_until(lambda: all(_is_up(node, count) for node in nodes), "the cluster is up")
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def command(server: LocalRedis, *args: object) -> Any:
    """Run one command on a connection of its own."""
    with server.client() as client:
        run: Any = client.execute_command
        return run(*args)


def _is_up(node: LocalRedis, count: int) -> bool:
    info: bytes = command(node, "CLUSTER", "INFO")
    return {b"cluster_state:ok", b"cluster_known_nodes:%d" % count, b"cluster_size:1"} <= set(info.split())


@contextmanager
def sentinel_of(master: LocalRedis, service: str, directory: Path) -> Iterator[int]:
    """A sentinel that watches `master` under the name `service`; yields its port."""
    port = free_port()
    config = directory / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\nsentinel monitor {service} 127.0.0.1 {master.port} 1\n"
        f"sentinel down-after-milliseconds {service} 60000\n"
    )
    process = subprocess.Popen(
        [find_redis_server(), str(config), "--sentinel"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        client = redis.Redis("127.0.0.1", port, protocol=2, socket_timeout=WAIT_S)
        with client:
            wait_until(lambda: _pings(client), "the sentinel answers")
        yield port
    finally:
        process.kill()
        process.wait()


def _pings(client: redis.Redis) -> bool:
    with suppress(redis.exceptions.RedisError):
        return bool(client.ping())
    return False


@contextmanager
def canned_server(answers: Sequence[bytes], *, port: int = 0) -> Iterator[int]:
    """A server that answers each command of the n-th request of a connection with `answers[n]`; yields its port.

    A request is whatever arrives at once: right for small commands on the loopback.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, suppress(OSError):
                    for answer in answers:
                        request = client.recv(65536)
                        if not request:
                            break
                        client.sendall(answer * (1 + request.count(b"\r\n*")))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
