"""The router before replicas that do what they are told: refuse, hang, die, answer with something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kvstore.cluster.http import Site
from kvstore.cluster.openai import CompletionAsk, Reply, parse
from kvstore.cluster.replicas import SILENCES_TO_LOSE, check_urls
from kvstore.cluster.router import Router, RouterSettings
from kvstore.errors import ConfigError

Handler = Callable[[web.Request, CompletionAsk], Awaitable[web.StreamResponse]]
TEXT = "once upon a time"


class FakeReplica:
    """A server that speaks as a replica does; `behave` answers completions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.readyz = 200
        self.hits = self.shared = 0
        self.queued = 0
        self.lookup_s = 0.0
        self.asked = 0
        self.behave: Handler = answers()
        app = web.Application()
        app.on_response_prepare.append(self._sign)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_post("/v1/lookup", self._lookup)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self.site = Site(app, "127.0.0.1", 0)

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-KVStore-Replica"] = self.name

    async def _readyz(self, request: web.Request) -> web.Response:
        return web.json_response({"name": self.name}, status=self.readyz)

    async def _lookup(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.lookup_s)
        told = {"prompt_tokens": 100, "hit_tokens": self.hits, "shared_tokens": self.shared}
        return web.json_response({**told, "queued_tokens": self.queued})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        return await self.behave(request, parse(await request.read(), CompletionAsk))


def answers(text: str = TEXT, *, dies_after: int | None = None, error_after: int | None = None) -> Handler:
    """An answer word by word; or one whose connection breaks, or that reports an error, after so many words."""

    async def handle(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
        reply = Reply(ask, "m", 4)
        words = text.split(" ")
        if not ask.stream:
            if dies_after is not None:
                return die(request)
            return web.json_response(reply.whole(text, "stop", len(words), 0, {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        for at, word in enumerate(words):
            if at == dies_after:
                return die(request)
            if not response.prepared:
                await response.prepare(request)
            if at == error_after:
                await response.write(b'data: {"error": {"message": "a forward failed"}}\n\n')
                return response
            is_last = at == len(words) - 1
            await response.write(reply.chunk(word if is_last else word + " ", "stop" if is_last else None))
            await asyncio.sleep(0)
        await response.write(reply.end(len(words), 0, {}))
        return response

    def die(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return handle


def refuses(status: int, retry_after: str = "", code: str = "queue_full") -> Handler:
    async def handle(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
        headers = {"Retry-After": retry_after} if retry_after else {}
        return web.json_response({"error": {"code": code}}, status=status, headers=headers)

    return handle


async def hangs(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
    await asyncio.sleep(1000)
    raise AssertionError


class Bed:
    """Two replicas and a router before them."""

    def __init__(self, policy: str = "round-robin") -> None:
        self.policy = policy
        self.a, self.b = FakeReplica("a"), FakeReplica("b")

    async def start(self) -> None:
        for replica in (self.a, self.b):
            await replica.site.start()
        urls = [replica.site.url for replica in (self.a, self.b)]
        # Health is asked for once; afterwards a test decides when.
        self.router = Router(RouterSettings(urls, self.policy, "127.0.0.1", 0, 0.2, health_interval_s=1000.0))
        await self.router.start()
        self.session = aiohttp.ClientSession()

    async def close(self) -> None:
        await self.session.close()
        await self.router.close()
        for replica in (self.a, self.b):
            await replica.site.close()

    async def ask(self, **fields: Any) -> tuple[int, Any, str]:
        """Status, body, and who answered."""
        async with self.session.post(f"{self.router.site.url}/v1/completions", json={"prompt": "x", **fields}) as got:
            return got.status, json.loads(await got.read()), got.headers.get("X-KVStore-Replica", "")

    async def stream(self, **fields: Any) -> tuple[int, list[Any]]:
        """Status and events, the last one "[DONE]" if it came."""
        body = {"prompt": "x", "stream": True, **fields}
        async with self.session.post(f"{self.router.site.url}/v1/completions", json=body) as got:
            data = [line[6:] for line in (await got.read()).decode().split("\n\n") if line]
            return got.status, [one if one == "[DONE]" else json.loads(one) for one in data]

    async def health(self) -> None:
        for link in self.router.replicas.links:
            await self.router.replicas._ask(link)

    async def told(self) -> str:
        async with self.session.get(f"{self.router.site.url}/metrics") as got:
            return (await got.read()).decode()


@asynccontextmanager
async def a_bed(policy: str = "round-robin") -> AsyncIterator[Bed]:
    bed = Bed(policy)
    try:
        await bed.start()
        yield bed
    finally:
        await bed.close()


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    async with a_bed() as made:
        yield made


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in events if event != "[DONE]" and event.get("choices"))


async def test_round_robin_takes_them_in_turns(bed: Bed) -> None:
    assert [(await bed.ask())[2] for _ in range(4)] == ["a", "b", "a", "b"]


async def test_answers_and_errors_of_a_replica_come_through_as_they_are(bed: Bed) -> None:
    status, body, _ = await bed.ask()
    assert (status, body["choices"][0]["text"]) == (200, TEXT)

    bed.b.behave = refuses(400, code="invalid_value")

    assert (await bed.ask())[:2] == (400, {"error": {"code": "invalid_value"}})
    assert bed.a.asked == bed.b.asked == 1


async def test_hints_come_through_as_they_are_and_so_do_their_outcomes(bed: Bed) -> None:
    asked: list[CompletionAsk] = []
    outcomes = [{"action_id": "a", "action": "pin", "status": "accepted"}]

    async def handle(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
        asked.append(ask)
        return web.json_response(Reply(ask, "m", 4).whole(TEXT, "stop", 4, 0, {"hints": outcomes}))

    bed.a.behave = bed.b.behave = handle
    hint = {"protocol_version": "1.0", "actions": [{"action_id": "a", "action_type": "pin"}]}
    _, body, _ = await bed.ask(kvstore={"hints": hint, "last_turn": True}, kv_transfer_params={"kv_hint": hint})

    assert (asked[0].hints, asked[0].kvstore.last_turn) == ([hint, hint], True)
    assert body["kvstore"]["hints"] == outcomes


async def test_a_stream_comes_through_untouched(bed: Bed) -> None:
    status, events = await bed.stream(stream_options={"include_usage": True})

    assert (status, text_of(events), events[-1]) == (200, TEXT, "[DONE]")
    assert events[-2]["usage"]["completion_tokens"] == 4


async def test_a_replica_that_is_not_there_is_passed_over(bed: Bed) -> None:
    await bed.a.site.close()

    assert [(await bed.ask())[2] for _ in range(3)] == ["b", "b", "b"]
    assert not bed.router.replicas.links[0].is_ready


async def test_a_replica_that_is_back_is_used_again(bed: Bed) -> None:
    bed.a.behave = refuses(503)
    assert [(await bed.ask())[2] for _ in range(2)] == ["b", "b"]
    assert bed.a.asked == 1

    bed.a.behave = answers()
    await bed.health()

    assert {(await bed.ask())[2] for _ in range(2)} == {"a", "b"}


async def test_a_replica_that_is_not_ready_is_not_asked(bed: Bed) -> None:
    bed.a.readyz = 503
    await bed.health()

    assert [(await bed.ask())[2] for _ in range(2)] == ["b", "b"]
    assert bed.a.asked == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_death_before_the_first_byte_is_not_noticed(bed: Bed, stream: bool) -> None:
    bed.a.behave = answers(dies_after=0)

    text = text_of((await bed.stream())[1]) if stream else (await bed.ask())[1]["choices"][0]["text"]

    assert text == TEXT
    assert bed.a.asked == bed.b.asked == 1
    assert 'kvstore_router_retries_total{reason="died",replica="a"} 1.0' in await bed.told()


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_death_in_the_middle_of_a_stream_is_told_in_it_and_ends_it(bed: Bed, temperature: int) -> None:
    bed.a.behave = answers(dies_after=2)

    status, events = await bed.stream(temperature=temperature)

    assert (status, text_of(events[:-1])) == (200, "once upon ")
    error = events[-1]["error"]
    assert (error["code"], error["type"]) == ("replica_lost", "server_error")
    assert error["message"].startswith("the answer was cut short: a: its connection broke")
    assert bed.b.asked == 0
    assert "kvstore_router_broken_streams_total 1.0" in await bed.told()


async def test_an_error_in_a_stream_ends_it_with_its_words_and_the_replica_stays(bed: Bed) -> None:
    bed.a.behave = answers(error_after=1)

    _, events = await bed.stream(temperature=0)

    assert text_of(events[:-1]) == "once "
    assert "a: a forward failed" in events[-1]["error"]["message"]
    assert bed.router.replicas.links[0].is_ready


async def test_an_error_before_the_first_text_is_tried_elsewhere(bed: Bed) -> None:
    bed.a.behave = answers(error_after=0)

    _, events = await bed.stream()

    assert (text_of(events), events[-1]) == (TEXT, "[DONE]")
    assert bed.a.asked == bed.b.asked == 1


async def test_a_stream_that_ends_without_done_is_told(bed: Bed) -> None:
    async def stops(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(Reply(ask, "m", 4).chunk("once ", None) + b'data: {"half')
        return response

    bed.a.behave = stops

    _, events = await bed.stream()

    assert text_of(events[:-1]) == "once "
    assert "its stream ended early" in events[-1]["error"]["message"]


async def test_one_that_refuses_is_passed_over(bed: Bed) -> None:
    bed.a.behave = refuses(429, "9")

    assert [(await bed.ask())[2] for _ in range(2)] == ["b", "b"]
    assert bed.router.replicas.links[0].is_ready


async def test_if_all_refuse_the_shortest_wait_is_told(bed: Bed) -> None:
    bed.a.behave = refuses(429, "9", "token_budget")
    bed.b.behave = refuses(429, "4", "queue_full")

    async with bed.session.post(f"{bed.router.site.url}/v1/completions", json={"prompt": "x"}) as got:
        body = await got.json()

    assert (got.status, got.headers["Retry-After"], body["error"]["code"]) == (429, "4", "queue_full")
    assert 'kvstore_router_requests_total{replica="none",status="429"} 1.0' in await bed.told()


async def test_nobody_there_is_a_503_and_readyz_says_so(bed: Bed) -> None:
    bed.a.readyz = bed.b.readyz = 503
    await bed.health()

    status, body, _ = await bed.ask()

    assert (status, body["error"]["code"]) == (503, "no_replica")
    async with bed.session.get(f"{bed.router.site.url}/readyz") as got:
        assert (got.status, await got.json()) == (503, {"ready": 0, "replicas": 2})


async def test_a_replica_that_hangs_loses_its_requests_to_others(bed: Bed) -> None:
    bed.a.behave = hangs
    asking = asyncio.ensure_future(bed.ask())
    while not bed.a.asked:
        await asyncio.sleep(0.001)

    for _ in range(SILENCES_TO_LOSE):
        bed.router.replicas.links[0].silent()

    assert (await asking)[2] == "b"
    bed.a.behave = answers()
    await bed.health()
    assert {(await bed.ask())[2] for _ in range(2)} == {"a", "b"}


async def test_one_silence_is_no_reason_to_give_up(bed: Bed) -> None:
    for _ in range(SILENCES_TO_LOSE - 1):
        bed.router.replicas.links[0].silent()
    await bed.health()
    bed.router.replicas.links[0].silent()

    assert bed.router.replicas.links[0].is_ready


async def test_a_client_that_leaves_hangs_up_on_the_replica(bed: Bed) -> None:
    gone = asyncio.Event()

    async def wait(request: web.Request, ask: CompletionAsk) -> web.StreamResponse:
        try:
            return await hangs(request, ask)
        finally:
            gone.set()

    bed.a.behave = wait
    asking = asyncio.ensure_future(bed.ask())
    while not bed.router.replicas.links[0].in_flight:
        await asyncio.sleep(0.001)
    while not bed.a.asked:
        await asyncio.sleep(0.001)

    asking.cancel()

    await asyncio.wait_for(gone.wait(), 30)
    assert bed.router.replicas.links[0].in_flight == 0
    assert bed.router.replicas.links[0].is_ready


async def test_prefix_goes_where_least_has_to_be_computed() -> None:
    async with a_bed("prefix") as bed:
        bed.b.hits = 64
        assert [(await bed.ask())[2] for _ in range(3)] == ["b", "b", "b"]

        bed.b.queued = 65

        assert (await bed.ask())[2] == "a"
        async with bed.session.get(f"{bed.router.site.url}/v1/replicas") as got:
            told = await got.json()
    assert [(one["name"], one["requests"], one["hit_tokens"]) for one in told] == [("a", 1, 0), ("b", 3, 192)]


async def test_prefix_goes_to_the_replica_that_has_the_pages_itself_before_those_that_share_them() -> None:
    async with a_bed("prefix") as bed:
        bed.a.hits = bed.b.hits = bed.a.shared = 64

        assert [(await bed.ask())[2] for _ in range(3)] == ["b", "b", "b"]


async def test_prefix_does_not_wait_for_a_view_that_comes_late() -> None:
    async with a_bed("prefix") as bed:
        bed.b.hits, bed.b.lookup_s = 64, 100.0

        assert (await bed.ask())[2] == "a"
        assert bed.router.replicas.links[1].num_silent_lookups == 1


async def test_other_paths_are_forwarded_or_refused(bed: Bed) -> None:
    async with bed.session.get(f"{bed.router.site.url}/v1/models") as got:
        assert await got.json() == {"data": [{"id": "m"}]}
    async with bed.session.get(f"{bed.router.site.url}/v1/nothing") as got:
        assert (got.status, (await got.json())["error"]["message"]) == (404, "not found")
    async with bed.session.get(f"{bed.router.site.url}/healthz") as got:
        assert await got.json() == {"policy": "round-robin"}


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        ([], "--replica is missing"),
        (["localhost:8001"], "it must be http://host:port"),
        (["http://a:1/path"], "it must be http://host:port"),
        (["http://a:1", "http://a:1/"], "the same URL is given twice"),
    ],
)
def test_urls_are_checked(urls: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_urls(urls)


def test_a_url_may_end_as_openais_clients_write_it() -> None:
    assert check_urls(["http://a:1/v1", "http://b:2/"]) == ["http://a:1", "http://b:2"]


async def test_a_port_in_use_is_told_with_what_to_do(bed: Bed) -> None:
    settings = RouterSettings([bed.a.site.url], "round-robin", "127.0.0.1", bed.router.site.port)
    router = Router(settings)
    try:
        with pytest.raises(ConfigError, match=rf"--port {settings.port}: .* name another port, or 0 for any"):
            await router.start()
    finally:
        await router.close()
