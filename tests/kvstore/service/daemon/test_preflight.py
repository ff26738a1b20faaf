"""What can never work stops the start; what may come to work is told, and /readyz says so."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.service.daemon import preflight
from kvstore.service.daemon.preflight import Preflight
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.redis import info
from tests.helpers.daemons import START_S, Http, attach, daemon_config, local_daemon, wait_until
from tests.helpers.stores import PAGE_BYTES, prompt, save


def refusal(tmp_path: Path, disk: Path | None = None, **sections: Any) -> str:
    """What the start is refused with."""
    with pytest.raises(ConfigError) as told:
        Preflight(daemon_config(tmp_path / "kv.sock", disk, **sections)).check()
    return str(told.value)


def test_a_disk_path_that_is_a_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert "it is no directory" in refusal(tmp_path, tmp_path / "file")
    assert f"{tmp_path / 'file'} is no directory" in refusal(tmp_path, tmp_path / "file" / "below")


def test_a_disk_path_that_cannot_be_written_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    told = refusal(tmp_path, tmp_path / "kv")

    assert "cannot write" in told
    assert str(tmp_path) in told


def test_a_directory_of_another_user_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "owner_problem", lambda status: "belongs to eve, and this process runs as adam")

    assert "belongs to eve" in refusal(tmp_path, tmp_path)


def test_more_memory_than_there_is_stops_the_start_with_the_number_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: (64 + 100) << 20)

    assert "set it to at most 100MiB" in refusal(tmp_path, host={"capacity_bytes": 200 << 20})


def test_a_path_that_is_not_there_yet_and_memory_that_is_are_right(tmp_path: Path) -> None:
    Preflight(daemon_config(tmp_path / "kv.sock", tmp_path / "some" / "where" / "new")).check()


def test_a_daemon_whose_redis_is_not_reached_is_up_and_says_that_it_is_not_ready(tmp_path: Path) -> None:
    url = {"redis": {"url": "redis://kv:hunter2@127.0.0.1:1/0"}}
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}, **url) as daemon:
        http = Http(daemon.daemon.app.port)

        status, problem = http.call("GET", "/readyz")

        assert (status, problem["title"]) == (503, "not ready")
        assert "redis: not reached since the start" in problem["reasons"][0]
        assert "hunter2" not in str(problem)
        assert http.get("/healthz")["status"] == "ok"
        with attach(tmp_path / "kv.sock") as store:
            assert save(store, store.request(prompt(3))) == 3

    service = {"http_port": 0, "ready_without_redis": True}
    with local_daemon(tmp_path / "kv.sock", service=service, **url) as daemon:
        ready = Http(daemon.daemon.app.port).get("/readyz")
        assert ready["status"] == "ready"
        assert "redis" in ready["reasons"][0]


@pytest.mark.redis
def test_a_redis_that_comes_later_makes_the_daemon_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ASK_AGAIN_S", 0.1)
    with LocalRedis() as server:
        url = server.url
        seen = Preflight(daemon_config(tmp_path / "a.sock", redis={"url": url}))
        sections = {"redis": {"url": url}, "service": {"http_port": 0}}
        monkeypatch.setattr(info, "ask_servers", _unreached_twice(info.ask_servers))
        with local_daemon(tmp_path / "kv.sock", **sections) as daemon:
            http = Http(daemon.daemon.app.port)
            wait_until(lambda: http.call("GET", "/readyz")[0] == 200)

            asked = daemon.daemon.preflight.asked["redis"]
            assert "maxmemory-policy allkeys-lfu" in asked.text
            assert asked.text.startswith("version ")
            assert not asked.warning
        assert seen.problems() == []


def _unreached_twice(ask: Any) -> Any:
    calls = []

    def asking(url: str, *, timeout_s: float) -> Any:
        calls.append(url)
        if len(calls) < 3:
            raise ConnectionRefusedError("nobody is there")
        return ask(url, timeout_s=timeout_s)

    return asking


def test_a_store_that_would_not_fit_now_is_told_by_readyz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_daemon(tmp_path / "kv.sock", service={"http_port": 0}) as daemon:
        http = Http(daemon.daemon.app.port)
        assert http.get("/readyz") == {"status": "ready", "reasons": []}

        monkeypatch.setattr(preflight, "LOOK_AGAIN_S", -1.0)
        monkeypatch.setattr(preflight, "available_memory", lambda: 0)

        status, problem = http.call("GET", "/readyz")
        assert status == 503
        assert "host.capacity_bytes" in problem["reasons"][0]


# ---- the command


@contextmanager
def serving(tmp_path: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`kvstore serve`, and the file that it says everything to."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "kvstore", "serve", "--socket", str(tmp_path / "kv.sock")]
    for one in (f"host.capacity_bytes={64 * PAGE_BYTES}", "service.http_port=0", *settings):
        command += ["--set", one]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=tmp_path)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def test_serve_says_what_is_up_who_is_refused_and_what_ends(tmp_path: Path) -> None:
    with serving(tmp_path, f"disk.path={tmp_path / 'disk'}", "disk.capacity_bytes=1MiB") as (process, log):
        wait_until(lambda: b"clients" in log.read_bytes(), timeout_s=2 * START_S)
        said = log.read_text()
        assert f"KVSTORE_SERVICE__URL=unix://{tmp_path / 'kv.sock'}" in said
        assert "http://127.0.0.1:" in said
        assert "dashboard" in said
        assert "host      512 KiB" in said
        assert "huge pages:" in said
        assert f"1 MiB in {tmp_path / 'disk'}; nothing stored there yet" in said
        assert "redis     off" in said
        assert len(said.splitlines()) <= 12

        from kvstore.layout import GroupKind, LayerGroup, Layout
        from kvstore.service.client.connect import connect
        from tests.helpers.stores import namespace

        large = Layout(16, (LayerGroup(GroupKind.FULL, (0,), 1 << 20),), "test:large", "uint8")
        with pytest.raises(ConfigError):
            connect(f"unix://{tmp_path / 'kv.sock'}", large, namespace(large))
        wait_until(lambda: "WARNING" in log.read_text())
        assert "a client is refused" in log.read_text()

        process.send_signal(signal.SIGINT)
        assert process.wait(START_S) == 0
        assert "SIGINT: ending 0 clients with 0 open leases" in log.read_text()
        assert log.read_text().rstrip().endswith("kvstore: ended")


@pytest.mark.parametrize("setting", ["disk.path=/etc/passwd", "host.capacity_bytes=900TiB"])
def test_serve_ends_at_once_with_what_can_never_work(tmp_path: Path, setting: str) -> None:
    with serving(tmp_path, setting) as (process, log):
        assert process.wait(2 * START_S) == 2
        assert setting.partition("=")[0] in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_free_port_is_told_as_it_is(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with serving(tmp_path, f"service.http_port={taken.getsockname()[1]}") as (process, log):
            assert process.wait(2 * START_S) == 2
            assert "in use" in log.read_text()
