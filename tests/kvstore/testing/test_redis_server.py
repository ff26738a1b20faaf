from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.testing.redis_server import (
    BINARY_VARIABLE,
    LocalRedis,
    RedisDidNotStart,
    RedisNotInstalled,
    find_redis_server,
)
from tests.helpers.redis_server import NEEDS_OPENSSL, NEEDS_REDIS, command, make_certificate


def once(port: int) -> redis.Redis:
    """A client without password or TLS that tries once."""
    return redis.Redis("127.0.0.1", port, retry=Retry(NoBackoff(), 0))


def test_a_missing_binary_is_an_error_that_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(BINARY_VARIABLE, raising=False)

    with pytest.raises(RedisNotInstalled, match="not on PATH; install it with `apt-get install redis-server`"):
        LocalRedis()


def test_the_binary_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "my-redis"
    monkeypatch.setenv(BINARY_VARIABLE, str(binary))
    with pytest.raises(RedisNotInstalled, match=f"{BINARY_VARIABLE}={binary} is not a program"):
        find_redis_server()

    binary.write_text("#!/bin/sh\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)

    assert find_redis_server() == str(binary)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script")
def test_a_server_that_does_not_start_tells_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "my-redis"
    binary.write_text("#!/bin/sh\necho no memory for you\nexit 1\n")
    binary.chmod(0o700)
    monkeypatch.setenv(BINARY_VARIABLE, str(binary))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    with pytest.raises(RedisDidNotStart, match="no memory for you"):
        LocalRedis().start()


class TestRunning:
    pytestmark = NEEDS_REDIS

    def test_it_serves_on_port_and_unix_socket_and_leaves_nothing(self) -> None:
        with LocalRedis() as server:
            pid = server.pid
            command(server, "SET", "k", "v")
            with redis.Redis.from_url(server.url) as tcp, redis.Redis.from_url(server.unix_url) as unix:
                assert tcp.get("k") == unix.get("k") == b"v"
                config: Any = unix.config_get("dir")
                directory = Path(config["dir"])
            assert directory.is_dir()

        assert not psutil.pid_exists(pid)
        assert not directory.exists()

    def test_it_is_a_cache_that_writes_nothing_to_disk(self) -> None:
        names = ("save", "appendonly", "maxmemory", "maxmemory-policy")
        with LocalRedis(maxmemory_bytes=64 << 20) as server, server.client() as client:
            config: Any = client.config_get(*names)

        assert [config[name] for name in names] == ["", "no", str(64 << 20), "allkeys-lfu"]

    def test_after_a_kill_it_comes_back_empty_on_the_same_port(self) -> None:
        with LocalRedis() as server:
            port = server.port
            command(server, "SET", "k", "v")

            server.kill()
            with pytest.raises(redis.exceptions.ConnectionError):
                command(server, "PING")
            server.start()

            assert server.port == port
            assert command(server, "GET", "k") is None

    def test_a_frozen_server_stops_and_runs_again(self) -> None:
        with LocalRedis() as server:
            process = psutil.Process(server.pid)

            server.freeze()
            assert process.status() == psutil.STATUS_STOPPED
            server.thaw()

            assert command(server, "PING") is True

    def test_a_frozen_server_is_stopped_too(self) -> None:
        with LocalRedis() as server:
            pid = server.pid
            server.freeze()

        assert not psutil.pid_exists(pid)

    def test_it_asks_for_its_password(self) -> None:
        with LocalRedis(password="p@ss/word") as server:
            with redis.Redis.from_url(server.url) as client:
                assert client.ping()
            with once(server.port) as client, pytest.raises(redis.exceptions.AuthenticationError):
                client.ping()

    @NEEDS_OPENSSL
    def test_it_speaks_tls(self, tmp_path: Path) -> None:
        cert, key = make_certificate(tmp_path)
        with LocalRedis(tls_cert=cert, tls_key=key) as server:
            with redis.Redis.from_url(server.url) as client:
                assert client.ping()
            with once(server.port) as client, pytest.raises(redis.exceptions.ConnectionError):
                client.ping()

    def test_somebody_elses_server_on_the_port_is_not_taken_for_ours(self) -> None:
        with LocalRedis() as other:
            ours = LocalRedis(start_timeout_s=5.0)
            ours.port = other.port

            with pytest.raises(RedisDidNotStart, match="Address already in use"):
                ours.start()
