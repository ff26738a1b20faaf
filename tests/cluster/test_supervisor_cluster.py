"""The command, with real processes: two machines' worth of them, sharing a Redis server, on a small random model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from kvstore.demo.random_model import Shape, make_random_model
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = NEEDS_REDIS

PROMPT = "You are a helpful assistant of a shipping company. " * 14  # one token per byte: five chunks of 128 and a tail


class Cluster:
    """One cluster, seen only through the command and HTTP."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.up: subprocess.Popen[str] | None = None

    def command(self, name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "kvstore", "cluster", name, "--directory", str(self.directory), *options]

    def run(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *options), capture_output=True, text=True, timeout=WAIT_S, env=plain(), check=False
        )

    def bring_up(self, *options: str) -> None:
        """Start `up` and wait until it says that it stands by."""
        self.up = subprocess.Popen(
            self.command("up", "--port", "0", "--set", "host.capacity_bytes=16MiB", *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=plain(),
        )
        assert self.up.stderr is not None
        said = []
        for line in self.up.stderr:
            said.append(line)
            if "Ctrl-C ends it" in line:
                return
        raise AssertionError("".join(said))

    def end_up(self) -> None:
        if self.up is not None:
            self.up.kill()
            self.up.communicate()
            self.up = None

    def status(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in json.loads(self.run("status", "--json").stdout).get("local", [])}

    def pids(self) -> list[int]:
        return [row["pid"] for row in self.status().values() if row["pid"]]

    def ask(self, process: str, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
        answer: dict[str, Any] = json.loads(call(self.status()[process]["url"], "POST", "/v1/completions", body))
        return answer


def call(url: str, method: str, path: str, body: Any = None) -> str:
    """The body of an answer that must be one."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=WAIT_S)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return text
    finally:
        connection.close()


def plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_random_model(directory, Shape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=96, positions=4096))
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    short = Path(tempfile.mkdtemp(prefix="kv-cl-", dir="/tmp"))  # for the sockets' paths
    made = Cluster(short)
    try:
        made.bring_up("--model", str(model), "--replicas", "2", "--nodes", "2", "--threads", "1")
        yield made
    finally:
        made.run("down")
        made.end_up()
        shutil.rmtree(short, ignore_errors=True)


def wait_until_redis_has_it(cluster: Cluster) -> None:
    """What node-0 owes to Redis is written."""
    url = cluster.status()["node-0"]["url"]
    told: list[str] = []

    def has_it() -> bool:
        lines = call(url, "GET", "/metrics").splitlines()
        spilled = [line for line in lines if line.startswith("kvstore_spilled_pages_total{")]
        owed = [line for line in lines if line.startswith("kvstore_owed_pages{")]
        told[:] = spilled + owed
        return any(not line.endswith(" 0.0") for line in spilled) and all(line.endswith(" 0.0") for line in owed)

    wait_until(has_it, lambda: "\n".join(told), poll_s=0.1)


def test_what_one_machine_computed_the_other_finds_in_redis(cluster: Cluster) -> None:
    first = cluster.ask("replica-0", PROMPT)
    wait_until_redis_has_it(cluster)

    second = cluster.ask("replica-1", PROMPT)

    assert sum(first["kvstore"]["hit_tokens"].values()) == 0
    assert second["kvstore"]["hit_tokens"]["redis"] >= 512
    assert second["choices"][0]["text"] == first["choices"][0]["text"]


def test_the_router_takes_turns(cluster: Cluster) -> None:
    seen = [cluster.ask("router", "Hello, who are you?")["kvstore"]["replica"] for _ in range(4)]

    assert sorted(set(seen)) == ["replica-0", "replica-1"]


def test_a_restart_of_everything_but_redis_keeps_the_hits(cluster: Cluster) -> None:
    cluster.ask("replica-0", PROMPT)
    wait_until_redis_has_it(cluster)
    before = cluster.status()

    done = cluster.run("restart")

    after = cluster.status()
    assert done.returncode == 0, done.stderr
    assert {name for name in before if before[name]["pid"] == after[name]["pid"]} == {"redis"}
    assert cluster.ask("replica-0", PROMPT)["kvstore"]["hit_tokens"]["redis"] >= 512


def test_a_second_up_of_the_name_is_refused(cluster: Cluster) -> None:
    done = cluster.run("up", "--port", "0", "--model", "random")

    assert done.returncode == 2
    assert "cluster 'local' is up already" in done.stderr


def test_restart_of_what_is_not_there_names_what_is(cluster: Cluster) -> None:
    done = cluster.run("restart", "replica-7")

    assert done.returncode == 2
    assert "no process 'replica-7'; it has redis, node-0, node-1, replica-0, replica-1, router" in done.stderr


def test_down_leaves_nothing_after_up_was_killed(cluster: Cluster) -> None:
    pids = cluster.pids()
    assert len(pids) == 6
    assert cluster.up is not None
    cluster.up.send_signal(signal.SIGKILL)
    cluster.end_up()
    assert not any(map(is_gone, pids))

    done = cluster.run("down")

    assert done.stderr.strip() == "cluster local: 6 processes ended"
    assert all(map(is_gone, pids))
    assert cluster.status() == {}
    assert [path.name for path in cluster.directory.iterdir()] == ["local.lock"]
