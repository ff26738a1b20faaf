"""`vllm serve` as it is run: two replicas over HTTP share a Redis server; the metrics an operator looks at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.tiers.redis_local import LocalRedis, free_port
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, ENVIRONMENT, make_prompt, transfer_config

pytestmark = pytest.mark.timeout(900)
START_S = 300.0
SHORT = make_prompt(20, 7)  # less than a block: it neither loads nor saves


class Replica:
    """One `vllm serve`."""

    def __init__(self, model: str, extra: dict[str, Any], log: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rsplit(":", 1)[1]
        # What `vllm serve` runs. The command itself asks for a distribution named "vllm", which the CPU build is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
        command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager"]
        command += ["--block-size", str(BLOCK), "--served-model-name", "tiny"]
        command += ["--kv-transfer-config", json.dumps(transfer_config(extra))]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, cwd=Path(__file__).parents[3]
        )

    def wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            assert self._process.poll() is None, "vllm serve ended"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"vllm serve is not up after {START_S} s")

    def ask(self, prompt: Sequence[int]) -> list[int]:
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            tokens: list[int] = json.load(reply)["choices"][0]["token_ids"]
        return tokens

    def post(self, path: str) -> dict[str, Any]:
        """A call without a body."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method="POST"), timeout=60) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels. Raises AssertionError if there is no such metric at all."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        assert any(line.startswith(f"# TYPE {name} ") for line in lines), f"{name} is not at /metrics"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()


@pytest.fixture(scope="module")
def replicas(model_of: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("serve")
    with LocalRedis() as redis:
        extra = {"host": {"capacity_bytes": 32 * MiB, "huge_pages": False}, "redis": {"url": redis.url}}
        started = [Replica(model_of("gqa"), extra, folder / f"{n}.log") for n in range(2)]
        try:
            for replica in started:
                replica.wait()
            yield started
        finally:
            for replica in started:
                replica.close()


def test_the_second_replica_takes_what_the_first_computed(replicas: list[Replica], reference: Reference) -> None:
    first, second = replicas
    prompt = make_prompt(1500, 5)
    hit = 1499 // BLOCK * BLOCK

    assert first.ask(prompt) == reference.tokens([prompt])[0]
    until = time.monotonic() + 20
    tokens: list[int] = []
    while time.monotonic() < until and second.metric("vllm:kvstore_hit_tokens_total", 'tier="redis"') == 0:
        # Another last token each time, so that the replica's own cache does not hide the other's pages.
        tokens = second.ask([*prompt[:-1], 3 + int(time.monotonic()) % 1000])
        time.sleep(0.5)

    assert tokens
    assert second.ask(prompt) == reference.tokens([prompt])[0]
    assert second.metric("vllm:kvstore_hit_tokens_total", 'tier="redis"') == hit
    assert second.metric("vllm:external_prefix_cache_hits_total") >= hit
    assert second.metric("vllm:kvstore_hook_errors_total") == 0


def test_every_metric_that_the_documentation_names_is_served(replicas: list[Replica]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()
    names = set(re.findall(r"`(vllm:[a-z_]+)", text))

    assert {"vllm:kvstore_hit_tokens_total", "vllm:prompt_tokens_by_source_total"} <= names
    for name in names:
        replicas[0].metric(name)


def test_a_reset_over_http_forgets_what_is_stored(replicas: list[Replica]) -> None:
    first, _ = replicas
    prompt = make_prompt(1000, 6)
    loaded = []
    first.ask(prompt)
    for path in ("/reset_prefix_cache", "/reset_prefix_cache?reset_external=true"):
        while not first.post(path)["success"]:  # while blocks are held for saves
            first.ask(SHORT)
        before = settled(first, "vllm:kvstore_loaded_tokens_total")
        first.ask(prompt)
        loaded.append(settled(first, "vllm:kvstore_loaded_tokens_total") - before)

    assert loaded == [999 // BLOCK * BLOCK, 0]


def settled(replica: Replica, name: str) -> float:
    """A metric of ours: numbers come with steps, and not more often than every half second."""
    time.sleep(0.6)
    replica.ask(SHORT)
    return replica.metric(name)
