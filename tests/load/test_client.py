"""The client against a server that misbehaves: every end of a request has a name, and none is taken for an answer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvstore.errors import KVStoreError
from kvstore.load.client import Client
from kvstore.load.record import FAILED, OK, REFUSED, Record
from kvstore.load.requests import CHAT, COMPLETIONS
from kvstore.ports import free_port
from tests.helpers.openai_server import Behaviour, FakeServer

BODY = {"prompt": "one two three", "max_tokens": 5, "stream": True}


async def ask(server: FakeServer, body: dict[str, Any] | None = None, api: str = COMPLETIONS, **client: Any) -> Record:
    record = Record(0, 0)
    async with Client(server.url, model="fake", now=time.perf_counter, draw=lambda: 0.0, **client) as asker:
        await asker.ask(record, api, body or BODY, time.perf_counter())
    return record


async def test_answer_is_noted_with_times_usage_and_where_the_prompt_came_from(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.05, each_s=0.01)

    record = await ask(server)

    assert (record.status, record.http_status, record.error) == (OK, 200, "")
    assert (record.prompt_tokens, record.completion_tokens, len(record.piece_s)) == (3, 5, 5)
    assert record.piece_s == sorted(record.piece_s)
    assert record.ttft_s is not None
    assert record.ttft_s >= 0.05
    assert record.token_s is not None
    assert record.token_s >= 0.009
    assert record.hit_tokens == {"host": 0, "disk": 0, "redis": 0}
    assert record.replica == "replica-0"
    assert record.stages["load_s"] == 0.002
    assert len(record.text.split()) == 5


def test_what_an_engine_had_itself_is_a_tier_beside_ours() -> None:
    record = Record(0, 0)

    record.take(
        {
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 96}},
            "kvstore": {"hit_tokens": {"host": 64, "disk": 0, "redis": 0}},
        }
    )

    assert record.hit_tokens == {"host": 64, "disk": 0, "redis": 0, "engine": 32}
    assert record.cached_tokens == 96
    assert record.source == "host"


async def test_chat_is_asked_at_its_own_path(server: FakeServer) -> None:
    record = await ask(server, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}, CHAT)

    assert record.ok
    assert server.paths == ["/v1/chat/completions"]
    assert len(record.text.split()) == 3


async def test_another_make_of_server_leaves_columns_empty(server: FakeServer) -> None:
    server.speaks_extension = server.tells_cached = False

    record = await ask(server)

    assert record.ok
    assert (record.hit_tokens, record.cached_tokens, record.stages, record.replica) == (None, None, {}, "")
    assert record.source == "not told"


async def test_cached_tokens_of_another_make_count_without_a_tier(server: FakeServer) -> None:
    server.speaks_extension = False

    await ask(server, {**BODY, "prompt": "word " * 40})
    record = await ask(server, {**BODY, "prompt": "word " * 40})

    assert record.cached_tokens == 32
    assert record.source == "cached"


async def test_refused_request_comes_back_when_it_was_told_to(server: FakeServer) -> None:
    refusal = Behaviour(429, "queue_full", {"Retry-After": "1"})
    server.behave = lambda number, body: Behaviour() if number == 2 else refusal

    record = await ask(server)

    assert record.ok
    assert record.refusals == ["queue_full", "queue_full"]
    assert record.ttft_s is not None
    assert record.ttft_s >= 2.0, "the wait is part of what its user saw"


async def test_refused_request_is_counted_and_left_where_that_is_wanted(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(429, "token_budget", {"Retry-After": "1"})

    record = await ask(server, on_refusal="count")

    assert (record.status, record.refusals, record.error) == (REFUSED, ["token_budget"], "")
    assert len(server.bodies) == 1


async def test_refusals_do_not_outlast_the_timeout(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(429, "queue_full", {"Retry-After": "0"} if number < 3 else {})

    record = await ask(server, timeout_s=0.5)

    assert (record.status, record.error) == (FAILED, "timeout")
    assert record.refusals == ["queue_full"] * 4


@pytest.mark.parametrize(
    ("after", "error", "detail"),
    [
        ("cut", "connection lost", ""),
        ("error", "error in the stream", "the replica died"),
        ("garbage", "bad answer", ""),
    ],
)
async def test_answer_that_breaks_off_is_an_error_and_keeps_no_time(
    server: FakeServer, after: str, error: str, detail: str
) -> None:
    server.behave = lambda number, body: Behaviour(after_pieces=after)

    record = await ask(server)

    assert (record.status, record.error) == (FAILED, error)
    assert detail in record.error_detail
    assert record.ttft_s is None
    assert record.end_s is not None


async def test_stream_that_ends_without_done_is_an_error(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(after_pieces="end")

    record = await ask(server)

    assert (record.status, record.error) == (FAILED, "cut short")
    assert "after 5 pieces" in record.error_detail


async def test_error_answer_is_told_with_the_servers_words(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(400, "context_length_exceeded")

    record = await ask(server)

    assert (record.status, record.error, record.error_detail) == (FAILED, "HTTP 400", "no: 400")
    assert record.replica == "replica-0"


async def test_slow_answer_is_given_up(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(first_s=5)

    record = await ask(server, timeout_s=0.1)

    assert (record.status, record.error) == (FAILED, "timeout")


async def test_answer_without_text_has_a_first_token_at_its_end(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(pieces=[])

    record = await ask(server)

    assert record.ok
    assert record.ttft_s is not None
    assert record.token_s is None


async def test_long_event_is_read_whole(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(pieces=["x" * 300_000, "y"])

    record = await ask(server)

    assert record.ok, record.error_detail
    assert len(record.text) == 300_001


async def test_nobody_there_is_told_with_the_next_step() -> None:
    async with Client(f"http://127.0.0.1:{free_port()}", now=time.perf_counter) as asker:
        with pytest.raises(KVStoreError, match=r"cannot be reached(.|\n)*kvstore cluster up.*--url"):
            await asker.choose_model()
        record = Record(0, 0)
        await asker.ask(record, COMPLETIONS, BODY, time.perf_counter())

    assert (record.status, record.error) == (FAILED, "cannot connect")


@pytest.mark.parametrize("url", ["localhost", "http://", "gopher://there"])
async def test_url_that_is_none_is_told(url: str) -> None:
    async with Client(url, now=time.perf_counter) as asker:
        with pytest.raises(KVStoreError, match="cannot be reached"):
            await asker.choose_model()


async def test_first_model_of_the_list_is_taken(server: FakeServer) -> None:
    server.models = {"data": [{"id": "small"}, {"id": "large"}]}

    async with Client(server.url + "/v1/", now=time.perf_counter) as asker:
        assert await asker.choose_model() == "small"


@pytest.mark.parametrize(
    ("models", "status", "wanted", "told"),
    [
        ({"data": []}, 200, "", "names no model .* --model"),
        ({}, 404, "", "HTTP 404.* --model"),
        ({"data": [{"id": "small"}]}, 200, "large", "no model 'large'; it has small"),
        ({}, 401, "", "--api-key"),
    ],
)
async def test_model_that_is_not_there_is_told_with_the_next_step(
    server: FakeServer, models: dict[str, Any], status: int, wanted: str, told: str
) -> None:
    server.models, server.models_status = models, status

    async with Client(server.url, model=wanted, now=time.perf_counter) as asker:
        with pytest.raises(KVStoreError, match=told):
            await asker.choose_model()


async def test_named_model_is_taken_from_a_server_that_lists_none(server: FakeServer) -> None:
    server.models, server.models_status = {}, 404

    async with Client(server.url, model="mine", now=time.perf_counter) as asker:
        assert await asker.choose_model() == "mine"


async def test_key_is_sent_as_bearer(server: FakeServer) -> None:
    await ask(server, api_key="secret")

    assert server.headers[0]["Authorization"] == "Bearer secret"
