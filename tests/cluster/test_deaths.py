"""Replica processes behind a router process: full, killed in the middle, killed before the first byte, told to end.

The tests take the replicas away one by one, so they run in their order and each says how many it needs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.replicas import REPLICA_OPTIONS, Answer, Server, Stream, end_all
from tests.helpers.waiting import WAIT_S, wait_until

TOKENS = 700  # an answer that takes long enough to be killed in
ASKED: dict[str, Any] = {"prompt": "once upon a time", "temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
OPTIONS = (*REPLICA_OPTIONS, "--max-queue", "1", "--max-running", "1", "--max-tokens-queued", "4000")


@dataclass
class Bed:
    router: Server
    replicas: dict[str, Server]

    @property
    def alive(self) -> list[Server]:
        return [server for server in self.replicas.values() if server.process.poll() is None]

    def link(self, name: str) -> Any:
        """How the router sees a replica."""
        return next(link for link in self.router.get("/v1/replicas").body if link["name"] == name)

    def busy(self) -> str:
        """The name of a replica that has a request; "" if none has."""
        return next((link["name"] for link in self.router.get("/v1/replicas").body if link["in_flight"]), "")


@pytest.fixture(scope="module")
def bed(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    directory = tmp_path_factory.mktemp("bed")
    names = ("first", "second", "third")
    servers = [
        Server(directory, "replica", "--model", str(model_directory), "--name", name, *OPTIONS) for name in names
    ]
    try:
        for server in servers:
            server.wait_listening()  # long before the model is there
        router = Server(directory, "router", *(part for server in servers for part in ("--replica", server.url)))
        servers.append(router)
        router.wait_listening()
        assert servers[0].get("/readyz").body["state"] in ("loading", "ready")
        wait_until(lambda: router.get("/readyz").body["ready"] == len(names), lambda: router.text)
        yield Bed(router, dict(zip(names, servers, strict=False)))
    finally:
        end_all(servers)


def is_idle(server: Server) -> bool:
    stats = server.get("/v1/stats").body
    return not (stats["running"] or stats["queued"] or stats["held_tokens"] or stats["store"]["leases"])


def test_a_full_queue_refuses_and_a_place_in_it_is_given_back(bed: Bed) -> None:
    server = bed.replicas["first"]
    running = Stream(server.url, "/v1/completions", {**ASKED, "max_tokens": 1900})
    running.read(1)
    queued = Stream(server.url, "/v1/completions", {**ASKED, "max_tokens": 1900})
    wait_until(lambda: server.get("/v1/stats").body["queued"] == 1)

    refused = server.post("/v1/completions", prompt="a", max_tokens=1)
    queued.close()
    wait_until(lambda: server.get("/v1/stats").body["queued"] == 0)
    too_much = server.post("/v1/completions", prompt="a", max_tokens=2500)
    running.close()
    wait_until(lambda: is_idle(server))

    assert [(one.status, one.error["code"]) for one in (refused, too_much)] == [
        (429, "queue_full"),
        (429, "token_budget"),
    ]
    assert all(int(one.headers["Retry-After"]) >= 1 for one in (refused, too_much))
    assert server.get("/v1/stats").body["refusals"] == {"queue_full": 1, "token_budget": 1}
    assert 'kvstore_replica_refusals_total{reason="queue_full"} 1.0' in server.get("/metrics").raw.decode()
    assert server.post("/v1/completions", prompt="a", max_tokens=1).status == 200


def test_only_if_all_are_full_does_the_router_refuse(bed: Bed) -> None:
    streams = [Stream(bed.router.url, "/v1/completions", {**ASKED, "max_tokens": 3000}) for _ in range(3)]
    for stream in streams:
        stream.read(1)

    refused = bed.router.post("/v1/completions", prompt="a", max_tokens=2000)
    for stream in streams:
        stream.close()
    wait_until(lambda: all(is_idle(server) for server in bed.alive))

    assert {stream.got.replica for stream in streams} == set(bed.replicas)
    assert (refused.status, refused.error["code"]) == (429, "token_budget")
    assert int(refused.headers["Retry-After"]) >= 1


def test_a_stream_whose_replica_is_killed_ends_with_an_error_and_the_next_request_is_answered(bed: Bed) -> None:
    whole = bed.router.post("/v1/completions", **ASKED)
    stream = Stream(bed.router.url, "/v1/completions", ASKED)
    stream.read(20)

    bed.replicas[stream.got.replica].kill()
    answer = stream.finish()

    assert not stream.is_done
    assert whole.text.startswith(answer.text)
    assert answer.events[-1]["error"]["code"] == "replica_lost"
    assert not bed.link(answer.replica)["ready"]
    assert bed.router.post("/v1/completions", **ASKED).text == whole.text


def test_a_request_whose_replica_is_killed_before_its_first_byte_is_answered_by_another_one(bed: Bed) -> None:
    assert len(bed.alive) == 2
    for server in bed.alive:
        server.signal(signal.SIGSTOP)  # so that the request is certainly there, and certainly not answered
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(bed.router.post("/v1/completions", **ASKED)))
    asking.start()
    wait_until(lambda: bed.busy() != "")
    victim = bed.replicas[bed.busy()]

    victim.kill()
    bed.alive[0].signal(signal.SIGCONT)
    asking.join(WAIT_S)

    assert [(answer.status, len(answer.text)) for answer in answers] == [(200, len(answers[0].text))]
    assert bed.replicas[answers[0].replica] is bed.alive[0]


def test_told_to_end_it_finishes_what_it_has_and_takes_nothing_new(bed: Bed) -> None:
    (server,) = bed.alive
    stream = Stream(server.url, "/v1/completions", ASKED)
    stream.read(1)

    server.signal(signal.SIGTERM)
    wait_until(lambda: server.get("/readyz").body["state"] == "closing")
    late = server.post("/v1/completions", prompt="a", max_tokens=1)
    through_the_router = bed.router.post("/v1/completions", prompt="a", max_tokens=1)
    answer = stream.finish()

    assert (late.status, late.error["code"]) == (503, "not_ready")
    assert (through_the_router.status, through_the_router.error["code"]) == (503, "no_replica")
    assert stream.is_done
    assert len(answer.events) == TOKENS
    assert server.process.wait(WAIT_S) == 0, server.text


def test_a_router_ends_when_it_is_told_to(bed: Bed) -> None:
    os.kill(bed.router.process.pid, signal.SIGTERM)

    assert bed.router.process.wait(WAIT_S) == 0
