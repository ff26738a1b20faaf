"""Fronts that share pages over a real Redis server, however their llama-servers were started; and as a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.ports import free_port
from kvstore.testing.redis_server import LocalRedis
from tests.engines.llamacpp.front import BLOCK, Front, model_file
from tests.engines.llamacpp.test_answers import HEAD, TAILS
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.waiting import WAIT_S, wait_until

pytestmark = NEEDS_REDIS
PROGRAM = Path(__file__).with_name("llama_server.py")


@pytest.fixture
def redis() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A llama-server that a user has built."""
    path = tmp_path / "llama-server"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"\n')
    path.chmod(0o700)
    return path


@pytest.fixture
def running(program: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a llama-server that runs already, and its folder of slots."""
    slots, port = tmp_path / "slots", free_port()
    slots.mkdir()
    options = ["--model", str(model_file()), "--host", "127.0.0.1", "--port", str(port), "--parallel", "2"]
    options += ["--ctx-size", "16384", "--threads", "1", "--slots", "--slot-save-path", str(slots)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen([str(program), *options], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_up(url), "llama-server is not up", timeout_s=WAIT_S)
        yield url, slots
    finally:
        process.terminate()
        process.wait(WAIT_S)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("how", ["package", "program", "url"])
def test_what_one_front_computed_another_takes_from_redis(
    start: Callable[..., Front], redis: LocalRedis, program: Path, running: tuple[str, Path], how: str
) -> None:
    shared = ("--set", f"redis.url={redis.url}")
    second_options = {
        "package": ("--parallel", "2"),
        "program": ("--server", str(program)),
        "url": ("--url", running[0], "--slots", str(running[1])),
    }[how]
    first = start(*shared)
    cold = first.ask(HEAD + TAILS[0])
    with redis.client() as client:
        wait_until(lambda: client.dbsize() >= cold.computed // BLOCK, "the pages are not in Redis")

    warm = start(*shared, *second_options).ask(HEAD + TAILS[0])

    assert cold.cached == 0
    assert warm.effect == "full"
    assert warm.by_tier == {"redis": warm.restored}
    assert warm.restored >= (cold.computed - 1) // BLOCK * BLOCK
    assert warm.text == cold.text


def test_a_cluster_of_two_machines_shares_redis_and_takes_a_restart(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="kv-ll-", dir="/tmp"))  # for the sockets' paths
    options = ["--engine", "llamacpp", "--nodes", "2", "--threads", "1", "--port", "0", "--detach"]
    options += ["--set", "host.capacity_bytes=64MiB", "--set", f"store.block_size={BLOCK}"]
    options += ["--set", "store.load_or_recompute=false", "--model", str(model_file())]
    try:
        run(directory, "up", *options, "--", "--parallel", "1", "--context", "1024")
        urls = {row["name"]: row["url"] for row in json.loads(run(directory, "status", "--json"))["local"]}
        cold = ask(urls["replica-0"], HEAD)
        wait_until(lambda: not owed(urls["node-0"]), "pages are owed to Redis", poll_s=0.2)

        warm = ask(urls["replica-1"], HEAD)
        looked_up = post(f"{urls['replica-0']}/v1/lookup", {"prompt": HEAD})
        routed = ask(urls["router"], HEAD)
        run(directory, "restart", "replica-0")
        again = ask(urls["replica-0"], HEAD)
    finally:
        run(directory, "down")
        shutil.rmtree(directory, ignore_errors=True)

    assert cold["kvstore"]["replica"] == "replica-0"
    assert warm["kvstore"]["replica"] == "replica-1"
    assert warm["kvstore"]["hit_tokens"]["redis"] == warm["kvstore"]["restored_tokens"] > 0
    assert looked_up["hit_tokens"] >= warm["kvstore"]["restored_tokens"]
    assert routed["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert sum(again["kvstore"]["hit_tokens"].values()) == warm["kvstore"]["restored_tokens"]
    texts = {one["choices"][0]["text"] for one in (cold, warm, routed, again)}
    assert len(texts) == 1


def run(directory: Path, command: str, *options: str) -> str:
    """One command about the cluster; what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    line = [sys.executable, "-m", "kvstore", "cluster", command, "--directory", str(directory), *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return json.load(answer)


def ask(url: str, prompt: str) -> Any:
    return post(f"{url}/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0})


def owed(node: str) -> bool:
    """Whether a node has pages that are not in Redis yet, or none at all."""
    with urllib.request.urlopen(f"{node}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    written = any(line.startswith("kvstore_spilled_pages_total{") and not line.endswith(" 0.0") for line in lines)
    return not written or any(line.startswith("kvstore_owed_pages{") and not line.endswith(" 0.0") for line in lines)
