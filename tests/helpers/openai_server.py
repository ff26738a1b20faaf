"""An OpenAI-compatible server without a model, for faults: it is slow, refuses, breaks off, talks nonsense on command.

Its tokens are words, its cache is a set of prefixes of whole blocks, its answers depend on the prompt alone. It speaks
the extension of our replicas (`kvstore` in requests and answers) unless told not to.
"""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.helpers.waiting import WAIT_S

BLOCK = 16


@dataclass
class Behaviour:
    """What happens to one request.

    status:       an error of this status with `code`, unless 200.
    first_s, each_s:  waiting before the first piece, before each further one.
    after_pieces: what comes after the text: "" the end as it should be, "end" nothing, "cut" the connection is closed,
                  "error" an event of an error, "garbage" an event that is no JSON.
    pieces:       text in place of the usual one.
    """

    status: int = 200
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    first_s: float = 0.0
    each_s: float = 0.0
    after_pieces: str = ""
    pieces: list[str] | None = None


class FakeServer:
    """State of the fake; `bodies` are the requests that came, warm-ups too.

    behave:  request number (in order of arrival, from 0) and body -> Behaviour.
    one_at_a_time: as a server with one engine.
    counted: what it tells at /metrics, a pair of tier and tokens for each request that was answered.
    """

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = {"data": [{"id": "fake"}]}
        self.models_status = 200
        self.behave: Callable[[int, dict[str, Any]], Behaviour] = lambda number, body: Behaviour()
        self.speaks_extension = True
        self.tells_cached = True
        self.has_cache = True
        self.obeys_cache_false = True
        self.replica = "replica-0"
        self.one_at_a_time = False
        self.counted: list[tuple[str, int]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._seen: set[int] = set()
        self._turn = asyncio.Lock()  # of the loop that first waits for it

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The bodies without warm-ups (which are the ones that want 4 tokens)."""
        return [body for body in self.bodies if body["max_tokens"] != 4]

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models, status=self.models_status)

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f'kvstore_replica_hit_tokens_total{{tier="{tier}"}} {float(len(self.bodies) * tokens)}\n'
            for tier, tokens in self.counted
        ]
        return web.Response(text="".join(lines))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        behaviour = self.behave(number, body)
        headers = {"X-KVStore-Replica": self.replica, **behaviour.headers} if self.speaks_extension else {}
        if behaviour.status != 200:
            error = {"message": f"no: {behaviour.status}", "code": behaviour.code}
            return web.json_response(
                {"error": error}, status=behaviour.status, headers={**headers, **behaviour.headers}
            )
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.one_at_a_time:
                async with self._turn:
                    return await self._stream(request, body, behaviour, headers)
            return await self._stream(request, body, behaviour, headers)
        finally:
            self._at_once -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], behaviour: Behaviour, headers: dict[str, str]
    ) -> web.StreamResponse:
        tokens = _tokens(body)
        wants_cache = body.get("kvstore", {}).get("cache", True) or not self.obeys_cache_false
        hits = self._look_up(tokens) if wants_cache and self.has_cache else 0
        pieces = behaviour.pieces
        if pieces is None:
            words = zlib.crc32(" ".join(map(str, tokens)).encode())
            pieces = [f" w{words + n}" for n in range(body["max_tokens"])]
        await asyncio.sleep(behaviour.first_s)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
        await response.prepare(request)
        is_chat = "messages" in body
        for place, piece in enumerate(pieces):
            if place:
                await asyncio.sleep(behaviour.each_s)
            choice: dict[str, Any] = {"delta": {"content": piece}} if is_chat else {"text": piece}
            await _send(response, {"choices": [{**choice, "finish_reason": None}]})
        if behaviour.after_pieces == "end":
            return response
        if behaviour.after_pieces == "cut":
            assert request.transport is not None
            request.transport.close()
            return response
        if behaviour.after_pieces == "error":
            await _send(response, {"error": {"message": "the replica died", "code": "replica_lost"}})
            return response
        if behaviour.after_pieces == "garbage":
            await response.write(b"data: {no json}\n\n")
            return response
        last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        await _send(response, {"choices": [{**last, "finish_reason": "length"}]})
        await _send(response, self._end(len(tokens), len(pieces), hits))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _end(self, num_prompt: int, num_new: int, hits: int) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": hits}
        event: dict[str, Any] = {"choices": [], "usage": usage}
        if self.speaks_extension:
            event["kvstore"] = {
                "replica": self.replica,
                "hit_tokens": {"host": hits, "disk": 0, "redis": 0},
                "queue_s": 0.001,
                "load_s": 0.002,
                "prefill_s": (num_prompt - hits) * 1e-4,
                "decode_s": 0.003,
                "ttft_s": 0.004,
            }
        return event

    def _look_up(self, tokens: list[Any]) -> int:
        prefixes = [hash(tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        hits = next((i for i, prefix in enumerate(prefixes) if prefix not in self._seen), len(prefixes))
        self._seen.update(prefixes)
        return min(hits * BLOCK, len(tokens) - 1)


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A fake on a free port of this machine, in a thread with a loop of its own; gone at the end."""
    server = FakeServer()
    started = threading.Event()
    ends: list[Callable[[], object]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        runner = web.AppRunner(server.app(), shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fake-server")
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield server
    finally:
        ends[0]()
        thread.join(WAIT_S)


def _tokens(body: dict[str, Any]) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, str):
        return prompt.split()
    return [word for message in body["messages"] for word in (message["role"], *message["content"].split())]


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
