"""`kvstore cluster up --engine vllm`: two vLLM servers on one daemon, behind a router; one is killed under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, make_prompt
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(1800)
START_S = 900.0  # two engines at once, on a machine that does more
ANSWER_S = 300.0
BUDGET = 3000


class VllmCluster:
    """The cluster, seen through the command and HTTP."""

    def __init__(self, model: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kv-vc-", dir="/tmp"))  # for the sockets' paths
        options = ["--engine", "vllm", "--server", sys.executable, "--model", model, "--redis", "none"]
        options += ["--port", "0", "--threads", "1", "--start-timeout", str(START_S), "--detach"]
        options += ["--set", "host.capacity_bytes=64MiB", "--set", f"store.block_size={BLOCK}"]
        options += ["--set", "store.load_or_recompute=false", "--set", "host.huge_pages=false"]
        self.run("up", *options, "--", "--max-tokens-queued", str(BUDGET), "--", "--max-model-len", "2048")
        self.urls = {name: row["url"] for name, row in self.status().items()}

    def run(self, command: str, *options: str) -> str:
        """One command; what it printed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
        line = [sys.executable, "-m", "kvstore", "cluster", command, "--directory", str(self.directory), *options]
        done = subprocess.run(line, capture_output=True, text=True, timeout=START_S, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """Each process."""
        return {row["name"]: row for row in json.loads(self.run("status", "--json"))["local"]}

    def ask(self, name: str, prompt: Sequence[int], new_tokens: int = 8, **body: Any) -> dict[str, Any]:
        """The answer of a process, in the form of `Reference`."""
        body = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | body
        answer = self.post(name, {"prompt": list(prompt), "logprobs": 1, **body})
        choice = answer["choices"][0]
        return {
            "tokens": choice["token_ids"],
            "logprobs": choice["logprobs"]["token_logprobs"],
            "cached": answer["usage"]["prompt_tokens_details"]["cached_tokens"],
            "replica": answer["kvstore"]["replica"],
        }

    def post(self, name: str, body: dict[str, Any], path: str = "/v1/completions") -> Any:
        request = urllib.request.Request(
            self.urls[name] + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)

    def get(self, name: str, path: str) -> str:
        with urllib.request.urlopen(self.urls[name] + path, timeout=ANSWER_S) as answer:
            text: str = answer.read().decode()
        return text

    def hits(self, name: str, tier: str) -> float:
        """What a replica counts as hits of a tier; -1 for none."""
        line = f'kvstore_replica_hit_tokens_total{{tier="{tier}"}} '
        found = [one for one in self.get(name, "/metrics").splitlines() if one.startswith(line)]
        return float(found[0].rsplit(" ", 1)[1]) if found else -1.0


@pytest.fixture(scope="module")
def cluster(model_of: Callable[[str], str]) -> Iterator[VllmCluster]:
    made = VllmCluster(model_of("gqa"))
    try:
        yield made
    finally:
        made.run("down")
        shutil.rmtree(made.directory, ignore_errors=True)


def test_what_one_replica_computed_the_other_loads_from_the_daemon(cluster: VllmCluster, reference: Reference) -> None:
    prompt = make_prompt(1000, 41)
    hit = 999 // BLOCK * BLOCK
    first = cluster.ask("replica-0", prompt)

    # vLLM publishes a save with its next step.
    wait_until(lambda: cluster.ask("replica-0", make_prompt(20, 7), 1) and pages(cluster) >= hit // BLOCK, "not saved")
    second = cluster.ask("replica-1", prompt)

    reference.check([first, second], [prompt, prompt])
    assert (first["cached"], second["cached"]) == (0, hit)
    assert (first["replica"], second["replica"]) == ("replica-0", "replica-1")
    wait_until(lambda: cluster.hits("replica-1", "host") == hit, "no hit is counted", poll_s=0.5)
    looked_up = cluster.post("replica-1", {"prompt": prompt}, "/v1/lookup")
    assert looked_up["prompt_tokens"] == 1000
    assert looked_up["hit_tokens"] >= 900


def test_a_request_without_the_cache_finds_nothing_and_leaves_nothing(cluster: VllmCluster) -> None:
    prompt = make_prompt(500, 42)
    before = pages(cluster)

    answers = [cluster.ask("replica-0", prompt, 2, kvstore={"cache": False}) for _ in range(2)]
    cluster.ask("replica-0", make_prompt(20, 7), 1)

    assert [answer["cached"] for answer in answers] == [0, 0]
    assert pages(cluster) == before > 0


def test_more_than_the_budget_is_refused_with_the_reason_and_a_time(cluster: VllmCluster) -> None:
    refused: list[tuple[str, int]] = []
    answered: list[int] = []

    def ask(seed: int) -> None:
        try:
            answered.append(len(cluster.ask("replica-1", make_prompt(1000, seed), 16)["tokens"]))
        except urllib.error.HTTPError as error:
            refused.append((f"{error.code} {json.load(error)['error']['code']}", int(error.headers["Retry-After"])))

    threads = [threading.Thread(target=ask, args=(50 + number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answered
    assert refused
    assert {reason for reason, _ in refused} == {"429 token_budget"}
    assert all(1 <= seconds < ANSWER_S for _, seconds in refused)
    assert set(answered) == {16}


def test_a_replica_that_is_killed_under_load_is_gone_round_and_comes_back_to_its_pages(cluster: VllmCluster) -> None:
    head = make_prompt(600, 60)
    cluster.ask("replica-0", head, 1)
    pid = cluster.status()["replica-0"]["pid"]
    engines = psutil.Process(pid).children(recursive=True)
    answers: list[dict[str, Any]] = []
    failed: list[str] = []
    ended = threading.Event()

    def load(user: int) -> None:
        for turn in range(100):
            if ended.is_set():
                return
            try:
                answers.append(cluster.ask("router", [*head, *make_prompt(40, 100 * user + turn)], 4))
            except urllib.error.HTTPError as error:
                failed.append(error.read().decode())

    users = [threading.Thread(target=load, args=(user,)) for user in range(2)]
    for user in users:
        user.start()
    wait_until(lambda: {answer["replica"] for answer in answers} == {"replica-0", "replica-1"}, "one got none")

    os.kill(pid, signal.SIGKILL)

    count = len(answers)
    wait_until(lambda: len(answers) > count + 4, "nothing is answered any more")
    ended.set()
    for user in users:
        user.join()
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in engines))
    assert failed == []
    assert {answer["replica"] for answer in answers[-3:]} == {"replica-1"}

    cluster.run("restart", "replica-0", "--start-timeout", str(START_S))
    again = cluster.ask("replica-0", [*head, *make_prompt(40, 999)], 1)
    assert again["cached"] == 600 // BLOCK * BLOCK
    wait_until(lambda: json.loads(cluster.get("router", "/readyz"))["ready"] == 2, "the router has not seen it")


def pages(cluster: VllmCluster) -> float:
    """Pages in the node's host memory."""
    lines = cluster.get("node-0", "/metrics").splitlines()
    held = [line for line in lines if line.startswith("kvstore_pages{") and 'tier="host"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in held)
