"""A vLLM server that computes nothing: one token for each character, and the counters of the real one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web


class FakeVllm:
    """The server.

    hold:   answers wait until it is set; a stream has its first token by then.
    cached: tokens of every prompt that it says it had.
    breaks: a stream's connection breaks after its first token.
    ends:   a stream ends after its first token, as if that were all.
    hangs:  nothing is answered any more.
    tells:  status of its metrics.
    """

    def __init__(self) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.cached = 0
        self.breaks = self.ends = self.hangs = False
        self.tells = 200
        self.is_well = True
        self.max_model_len = 4096
        self.bodies: list[dict[str, Any]] = []
        self.counters: dict[str, float] = {"vllm:prompt_tokens_total": 0, "vllm:generation_tokens_total": 0}
        self.url = ""
        app = web.Application(middlewares=[self._hang])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)

    async def start(self) -> FakeVllm:
        """Listen."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        return self

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    @web.middleware
    async def _hang(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.hangs:
            await asyncio.Event().wait()
        response: web.StreamResponse = await handler(request)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_well else 503)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = "".join(f"{name} {value}\n" for name, value in self.counters.items())
        return web.Response(text=text if self.tells == 200 else "", status=self.tells)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": tokens_of(body)})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body.get("max_tokens") == 13:
            return web.json_response({"error": {"message": "unlucky", "type": "BadRequestError"}}, status=400)
        prompt, new = len(tokens_of(body)), body.get("max_tokens", 4)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if not body.get("stream"):
            await self.hold.wait()
            choice = {"index": 0, "text": "a" * new, "finish_reason": "length"}
            return web.json_response({"choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(new):
            event = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if self.breaks:
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.ends:
                return response
            if number == 0:
                await self.hold.wait()
        if body.get("stream_options", {}).get("include_usage"):
            await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


def tokens_of(body: dict[str, Any]) -> list[int]:
    """One for each character."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return (
            [token for one in prompt for token in tokens_of({"prompt": one})] if isinstance(prompt[0], str) else prompt
        )
    text = prompt if prompt is not None else "".join(one["content"] for one in body["messages"])
    return [ord(letter) for letter in text]
