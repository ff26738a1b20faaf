"""Replica and router follow where sessions leave their prefix, beside the requests; replicas say how they render."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvstore.cluster import watch as module
from kvstore.cluster.replicas import Replicas
from kvstore.cluster.watch import PLAIN, PrefixWatch, WatchCollector
from tests.helpers.replicas import REPLICA_OPTIONS, Server, end_all, make_model
from tests.helpers.waiting import WAIT_S, wait_until
from tests.kvstore.prefix import templates

QUESTION = {"role": "user", "content": "When does the ferry leave the island?"}
ANSWER = {"role": "assistant", "content": "It leaves at seven."}
MORE = {"role": "user", "content": "And tomorrow?"}


def body(*messages: dict[str, str], session: str = "s") -> bytes:
    return json.dumps({"messages": messages, "kvstore": {"session": session}}).encode()


@pytest.fixture
def watch() -> Iterator[PrefixWatch]:
    made = PrefixWatch(PLAIN)
    yield made
    made.close()


def test_turns_are_followed_and_counted_by_shape_and_mechanism(watch: PrefixWatch) -> None:
    registry = CollectorRegistry()
    WatchCollector(watch, "kvstore_router").register(registry)

    watch.saw(body(QUESTION))
    watch.saw(body(QUESTION, ANSWER, MORE))
    watch.saw(body({"role": "system", "content": "Be brief."}, QUESTION, ANSWER, MORE, ANSWER, MORE))

    wait_until(lambda: watch.as_json().get("turns") == 2, lambda: str(watch.as_json()))
    text = generate_latest(registry).decode()
    assert 'kvstore_router_prefix_turns_total{mechanism="kept",shape="chat"} 1.0' in text
    assert 'kvstore_router_prefix_turns_total{mechanism="system_changed",shape="chat"} 1.0' in text
    assert "kvstore_router_prefix_repeated_elsewhere_tokens_total" in text


def test_the_models_own_template_is_used(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(templates.GENERATION_PROMPT)
    watch = PrefixWatch(str(tmp_path / "t.jinja"))
    try:
        watch.saw(body(QUESTION))
        watch.saw(body(QUESTION, ANSWER, MORE))

        wait_until(lambda: watch.as_json().get("turns") == 1, lambda: str(watch.as_json()))
        assert watch.as_json()["groups"][0]["mechanism"] == "generation_prompt"
    finally:
        watch.close()


def test_a_template_that_is_not_there_leaves_what_clients_change(caplog: pytest.LogCaptureFixture) -> None:
    watch = PrefixWatch("/nowhere")
    try:
        watch.saw(body(QUESTION))

        wait_until(lambda: watch.as_json().get("requests") == 1, lambda: str(watch.as_json()))
        assert watch.as_json()["template"] == "plain"
    finally:
        watch.close()


def test_what_is_too_much_or_no_request_is_counted_and_not_looked_at(
    watch: PrefixWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.saw(b"no request")
    wait_until(lambda: watch.unwatched == 1, lambda: str(watch.as_json()))
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 10)

    watch.saw(body(QUESTION))

    assert watch.as_json()["unwatched_requests"] == 2


def test_a_closed_watch_leaves_no_process(watch: PrefixWatch) -> None:
    watch.saw(body(QUESTION))
    wait_until(lambda: watch.as_json().get("requests") == 1, lambda: str(watch.as_json()))

    watch.close()
    watch.close()

    assert watch._process._child is None


async def test_replicas_that_render_differently_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    replicas = Replicas(["http://127.0.0.1:1", "http://127.0.0.1:2"], 1.0)
    first, second = replicas.links

    with caplog.at_level(logging.WARNING):
        first.up("a", "aaaa")
        second.up("b", "aaaa")
        replicas._check_renderings()
        assert not caplog.records

        second.up("b", "bbbb")
        replicas._check_renderings()
        replicas._check_renderings()

    assert [record.message for record in caplog.records] == [
        "replicas render chats differently, so that they cannot use each other's pages: a aaaa, b bbbb"
    ]
    assert replicas.renderings == {"aaaa", "bbbb"}
    assert [link.as_json()["rendering"] for link in replicas.links] == ["aaaa", "bbbb"]
    await asyncio.sleep(0)


def test_a_real_replica_tells_how_it_renders_and_where_sessions_left_their_prefix(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(templates.GENERATION_PROMPT)
    replica = Server(tmp_path, "replica", "--model", str(model), "--name", "a", "--watch-prefixes", *REPLICA_OPTIONS)
    router = None
    try:
        replica.wait_ready()
        router = Server(tmp_path, "router", "--replica", replica.url)
        router.wait_ready()

        for messages in ([QUESTION], [QUESTION, ANSWER, MORE]):
            assert router.post("/v1/chat/completions", messages=messages, max_tokens=1).status == 200

        wait_until(lambda: replica.get("/v1/prefix").body.get("turns") == 1, lambda: replica.text)
        (group,) = replica.get("/v1/prefix").body["groups"]
        assert group["mechanism"] == "generation_prompt"
        assert group["lost_tokens"] > 0
        assert b"kvstore_replica_prefix_lost_tokens_total" in replica.get("/metrics").raw
        rendering = replica.get("/readyz").body["rendering"]
        assert len(rendering) == 16
        assert [one["rendering"] for one in router.get("/v1/replicas").body] == [rendering]
        assert router.get("/v1/prefix").status == 404
        replica.signal(signal.SIGTERM)
        assert replica.process.wait(WAIT_S) == 0
    finally:
        end_all([replica, *([router] if router else [])])
