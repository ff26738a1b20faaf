"""`vllm serve` as it is run: two replicas over HTTP share a Redis server; the metrics an operator looks at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.ports import free_port
from kvstore.testing.redis_server import LocalRedis
from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, DTYPE, ENVIRONMENT, STORE, make_prompt, transfer_config
from tests.helpers.hints import envelope
from tests.helpers.waiting import WAIT_S, wait_until

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
        command += ["--host", "127.0.0.1", "--dtype", DTYPE, "--max-model-len", "4096", "--enforce-eager"]
        command += ["--block-size", str(BLOCK), "--served-model-name", "tiny"]
        command += ["--kv-transfer-config", json.dumps(transfer_config(extra))]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, cwd=Path(__file__).parents[3]
        )

    def wait(self) -> None:
        wait_until(self._is_up, "vllm serve is not up", timeout_s=START_S, poll_s=0.5)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, "vllm serve ended"
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=WAIT_S):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, prompt: Sequence[int], hint: dict[str, Any] | None = None) -> dict[str, Any]:
        """The tokens of the answer, their log probabilities, and what came back of a KV hint."""
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        body |= {"return_token_ids": True, "logprobs": 1}
        if hint is not None:
            body["kv_transfer_params"] = {"kv_hint": hint}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            answer = json.load(reply)
        choice = answer["choices"][0]
        told = answer.get("kv_transfer_params")
        return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"], "told": told}

    def post(self, path: str) -> dict[str, Any]:
        """A call without a body."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method="POST"), timeout=WAIT_S) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels. Raises AssertionError if there is no such metric at all."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=WAIT_S) as reply:
            lines = reply.read().decode().splitlines()
        assert any(line.startswith(f"# TYPE {name} ") for line in lines), f"{name} is not at /metrics"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()


@pytest.fixture(scope="module")
def redis() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture(scope="module")
def replicas(
    model_of: Callable[[str], str], redis: LocalRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("serve")
    host = {"capacity_bytes": 32 * MiB, "huge_pages": False}
    extra = {"host": host, "redis": {"url": redis.url}, "store": STORE}
    started = [Replica(model_of("gqa"), extra, folder / f"{n}.log") for n in range(2)]
    try:
        for replica in started:
            replica.wait()
        yield started
    finally:
        for replica in started:
            replica.close()


def test_the_second_replica_takes_what_the_first_computed(
    replicas: list[Replica], redis: LocalRedis, reference: Reference
) -> None:
    first, second = replicas
    prompt = make_prompt(1500, 5)
    hit = 1499 // BLOCK * BLOCK

    reference.check([first.ask(prompt)], [prompt], cached=0)
    with redis.client() as client:
        wait_until(lambda: client.dbsize() >= 1500 // BLOCK, "the first replica's pages are not in Redis")

    reference.check([second.ask(prompt)], [prompt], cached=hit)
    wait_until(lambda: settled(second, "vllm:kvstore_hit_tokens_total") > 0, "no number of a load came", poll_s=0.5)
    assert second.metric("vllm:kvstore_hit_tokens_total", 'tier="redis"') == hit
    assert second.metric("vllm:external_prefix_cache_hits_total") >= hit
    assert second.metric("vllm:kvstore_hook_errors_total") == 0


def test_hints_over_http_are_answered(replicas: list[Replica], reference: Reference) -> None:
    prompt = make_prompt(500, 8)

    first = replicas[0].ask(prompt, envelope(("pin", {"ttl_s": 60, "session": "s"}), ("evaporate", {})))
    wrong = replicas[0].ask(prompt, {"actions": "none"})

    reference.check([first], [prompt], cached=0)
    told = [(one["action"], one["status"]) for one in first["told"]["kv_hint"]["outcomes"]]
    assert told == [("pin", "deferred"), ("unknown", "ignored")]
    assert [one["status"] for one in wrong["told"]["kv_hint"]["outcomes"]] == ["rejected"]
    wait_until(lambda: settled(replicas[0], "vllm:kvstore_hints_total") == 3, "not all hints are counted", poll_s=0.5)


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
    """A metric of ours: numbers come with steps, and not more often than every half second. It has come to rest."""
    seen: list[float] = []

    def is_still() -> bool:
        replica.ask(SHORT)
        seen.append(replica.metric(name))
        return len(seen) > 2 and seen[-1] == seen[-3]

    wait_until(is_still, lambda: f"{name} goes on changing: {seen}", poll_s=0.6)
    return seen[-1]
