"""The compose file, brought up: Redis, a node, two replicas that share its memory, a router. `make test-compose`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from kvstore.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = shlex.split(
    os.environ.get("TEST_COMPOSE", "")
)  # "docker-compose" or "docker compose"; .ci/test-compose sets it
UP_S = 600.0
# About 2000 tokens of the random model's bytes: several prefill chunks.
PROMPT = "You answer for a shipping company, politely and with the number of the parcel. " * 25

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not COMPOSE, reason="needs a Docker engine and minutes: make test-compose"),
]


class Project:
    """One run of the compose file under a name and on ports of its own."""

    def __init__(self) -> None:
        self.router, self.node, self.prometheus = free_ports(3)
        self.name = f"kvtest{os.getpid()}"
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.name,
            "MODEL": os.environ.get("MODEL", "random"),
            "HOST_BYTES": "256MiB",
            "PORT": str(self.router),
            "NODE_PORT": str(self.node),
            "PROMETHEUS_PORT": str(self.prometheus),
        }

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*COMPOSE, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=UP_S,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def call(self, port: int, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer, or its text."""
        connection = HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text
        finally:
            connection.close()

    def ask(self, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        answer: dict[str, Any] = self.call(self.router, "POST", "/v1/completions", body)
        return answer

    def is_ready(self) -> bool:
        """Whether the router takes requests and both replicas are there."""
        try:
            replicas = self.call(self.router, "GET", "/v1/replicas")
        except (OSError, HTTPException, AssertionError):
            return False
        return all(replica["ready"] for replica in replicas)

    def metric(self, name: str, **labels: str) -> float:
        """The node's number."""
        for line in self.call(self.node, "GET", "/metrics").splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.5)


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    made = Project()
    try:
        made.run("up", "-d", "--no-build", "router")
        wait_until(made.is_ready, "the router did not become ready")
        yield made
    finally:
        made.run("down", "-v", "--timeout", "30")


def test_a_prompt_is_computed_once_and_served_by_both_replicas(project: Project) -> None:
    answers = [project.ask(PROMPT) for _ in range(3)]

    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == 0
    assert min(cached[1:]) > 1500
    assert {answer["kvstore"]["replica"] for answer in answers} == {"replica-0", "replica-1"}
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_the_nodes_api_is_reached_from_this_machine(project: Project) -> None:
    assert project.call(project.node, "GET", "/readyz") == {"status": "ready", "reasons": []}
    assert "<html" in project.call(project.node, "GET", "/").lower()


def test_the_load_generator_runs_in_the_network(project: Project) -> None:
    shape = ["--requests", "4", "--system-tokens", "100", "--question-tokens", "10", "--answer-tokens", "4"]

    out = project.run("run", "--rm", "-T", "load", "--workload", "shared-prompt", *shape)

    assert "4 of 4 requests answered" in out


def test_a_restart_of_everything_but_redis_keeps_the_hits(project: Project) -> None:
    first = project.ask(PROMPT)
    wait_until(
        lambda: (
            project.metric("kvstore_spilled_pages_total", tier="redis") > 0
            and project.metric("kvstore_owed_pages", tier="redis") == 0
        ),
        "Redis got no pages",
    )

    project.run("restart", "node", "replica-0", "replica-1", "router")
    wait_until(project.is_ready, "they did not come back", UP_S)

    again = project.ask(PROMPT)
    assert again["kvstore"]["hit_tokens"]["redis"] > 1500
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_a_killed_replica_is_done_without(project: Project) -> None:
    project.run("kill", "replica-1")

    answers = [project.ask(f"{number} {PROMPT}") for number in range(3)]

    assert {answer["kvstore"]["replica"] for answer in answers} == {"replica-0"}
    project.run("up", "-d", "--no-build", "replica-1")
    wait_until(project.is_ready, "replica-1 did not come back", UP_S)


@pytest.mark.skipif("PROMETHEUS_IMAGE" not in os.environ, reason="name an image that is here by PROMETHEUS_IMAGE")
def test_prometheus_answers_every_query_of_grafanas_dashboard(project: Project) -> None:
    project.run("up", "-d", "--no-build", "prometheus")

    def targets() -> list[dict[str, Any]]:
        try:
            answer = project.call(project.prometheus, "GET", "/api/v1/targets?state=active")
        except (OSError, HTTPException, AssertionError):
            return []
        found: list[dict[str, Any]] = answer["data"]["activeTargets"]
        return found

    wait_until(lambda: [one["health"] for one in targets()] == ["up"] * 4, "not all four targets are scraped")
    project.ask("something else " * 50)
    time.sleep(11)  # two scrapes, for a rate
    project.ask("and yet something " * 50)
    time.sleep(11)
    empty = []
    for panel in json.loads((ROOT / "deploy/grafana/dashboards/kvstore.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "15m")
            path = "/api/v1/query?" + urlencode({"query": query})
            answer = project.call(project.prometheus, "GET", path)
            assert answer["status"] == "success", query
            if not answer["data"]["result"]:
                empty.append(panel["title"])

    # Refusals and retries have samples only once there was one; a tier's bandwidth once it was read from.
    assert set(empty) <= {"Refusals, retries, failures per second", "Tier bandwidth"}


def test_down_leaves_nothing() -> None:
    """Runs a project of its own: Redis alone is enough to see it go."""
    made = Project()
    made.name = made.environment["COMPOSE_PROJECT_NAME"] = f"{made.name}down"
    made.run("up", "-d", "--no-build", "redis")

    made.run("down", "-v")

    for kind in (["ps", "-a"], ["volume", "ls"], ["network", "ls"]):
        listed = ["docker", *kind, "--quiet", "--filter", f"label=com.docker.compose.project={made.name}"]
        assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""
