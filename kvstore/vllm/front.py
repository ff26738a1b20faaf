"""An OpenAI-compatible server before one vLLM server: admission, and the face of every replica.

A request goes on as it came, but for what it says about the cache, which is put in vLLM's words; an answer comes back
as it is, with one object more, "kvstore". vLLM batches what is inside; this lets in no more than it can honestly take,
and says when to come again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import generate_latest

from kvstore import logs
from kvstore.cluster.admission import Admission, Refused, Ticket
from kvstore.cluster.bodies import as_object, parse_object, take_extension
from kvstore.cluster.front import CHAT, COMPLETION, LOST, RETRY_S, EngineFront
from kvstore.cluster.http import json_response, read_body
from kvstore.cluster.openai import ApiError, event
from kvstore.cluster.relay import ClientGone, to_client
from kvstore.metrics import CONTENT_TYPE
from kvstore.vllm.books import EngineBooks
from kvstore.vllm.engine import EngineGone, EngineSilent, VllmEngine
from kvstore.vllm.metrics import VllmMetrics
from kvstore.vllm.requests import AnswerUsage, apply_extension, ask_for_usage, event_of, held_answer_tokens, salt_of
from kvstore.vllm.seen import SeenPrompts
from kvstore.web.sse import read_events

log = logs.limited(__name__)

PASSED_ON = ("/tokenize", "/detokenize")
SEEN_TOKENS = 1 << 20  # of prompts whose routing is remembered: 16 thousand blocks, 1 MiB
LOOK_S = 1.0  # between looks at what the engine counts
SILENCES_TO_LOSE = 4  # in a row; so many times LOOK_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class VllmFrontSettings:
    """The settings of a front.

    port:        0 takes any free one.
    max_queue:   requests that may wait.
    max_running: requests that the engine computes at once.
    max_tokens:  prompt and answer tokens of all requests inside.
    drain_s:     at the end, longest wait for those inside.
    """

    name: str = "vllm"
    host: str = "127.0.0.1"
    port: int = 8001
    max_queue: int = 64
    max_running: int = 8
    max_tokens: int = 65536
    drain_s: float = 30.0


class VllmFront(EngineFront):
    """The application. Its event loop only."""

    def __init__(self, settings: VllmFrontSettings, engine: VllmEngine) -> None:
        metrics = VllmMetrics()
        super().__init__(settings.name, settings.host, settings.port, engine, metrics)
        self.settings = settings
        self.engine = engine
        self._counted = metrics
        self.books = EngineBooks(
            Admission(settings.max_queue, settings.max_tokens), settings.max_running, time.monotonic
        )
        metrics.attach(
            self.books.admission,
            num_running=lambda: self.books.num_running,
            num_queued=lambda: self.books.num_queued,
            store=None,
        )
        self.is_draining = False
        self._is_well = False
        self._silences = 0
        self._engine_text = ""
        self._seen = SeenPrompts(SEEN_TOKENS)
        self._looking: asyncio.Task[None] | None = None
        router = self.app.router
        for path in (CHAT, COMPLETION):
            router.add_post(path, self._generate)
        self.add_passed_on(reads=("/v1/models",), posts=PASSED_ON)
        router.add_post("/v1/lookup", self._lookup)
        router.add_get("/v1/stats", self._stats)
        router.add_get("/healthz", self._healthz)
        for path in ("/health", "/readyz"):
            router.add_get(path, self._readyz)
        router.add_get("/metrics", self._metrics)

    async def open(self) -> str:
        """Ask the engine what it is, and listen. Raises ConfigError for a server that is none of vLLM's."""
        await self.engine.identify()
        await self.look()
        await self.site.start()
        self._looking = asyncio.ensure_future(self._look_again())
        return f"{self.name} on {self.site.url}: ready, before vLLM at {self.engine.url}"

    async def close(self) -> None:
        """Drain, stop listening, hang up. Idempotent."""
        self.is_draining = True
        until = time.monotonic() + self.settings.drain_s
        while self.books.num_inside and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self.site.close()
        await self.engine.close()

    async def look(self) -> None:
        """Read the engine's counters, and whether it is well. One that hangs is given up, with what it has."""
        try:
            told = await self.engine.counters()
            self._is_well = await self.engine.is_well()
        except EngineGone as error:
            if self._is_well:
                log.warning("%s", error)
            self._is_well, self._engine_text = False, ""
            self._silences = self._silences + 1 if isinstance(error, EngineSilent) else 0
            if self._silences == SILENCES_TO_LOSE:
                log.warning("vLLM at %s hangs: what it has not answered is given up", self.engine.url)
                await self.engine.close()
        else:
            self._silences, self._engine_text = 0, ""
            if told is not None:
                counters, self._engine_text = told
                self.books.observe(counters)
                self._counted.take(counters)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    # ---- generating -------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        self._check_open()
        body = parse_object(await read_body(request, self.bodies))
        extension = take_extension(body)
        self.books.admission.check_queue(self.books.num_queued)
        tokens = await self.engine.tokenize(body, is_chat=request.path == CHAT) or []
        self._check_open()
        salt = salt_of(body, extension)
        new_tokens = held_answer_tokens(request.path, body, self.settings.max_tokens - len(tokens))
        self._check_fits(request.path, len(tokens), new_tokens)
        ticket = self.books.enter(len(tokens), new_tokens)
        try:
            if extension.cache:
                self._seen.add(tokens, salt)
            apply_extension(body, extension)
            return await self._forward(request, body, ticket, arrived)
        except LOST:
            raise EngineGone(f"vLLM at {self.engine.url} has broken off its answer") from None
        except (ClientGone, ConnectionResetError, asyncio.CancelledError):
            self.metrics.cancelled.inc()
            raise
        finally:
            self.books.leave(ticket)

    async def _forward(
        self, request: web.Request, body: dict[str, Any], ticket: Ticket, arrived: float
    ) -> web.StreamResponse:
        shows_usage = ask_for_usage(body) if body.get("stream") is True else True
        async with self.engine.generate(request.path, body) as answer:
            if answer.status == 200 and answer.content_type == "text/event-stream":
                return await self._stream(request, answer, ticket, arrived, shows_usage)
            raw = await answer.read()
        found, usage = as_object(raw), AnswerUsage()
        if answer.status != 200 or found is None or not usage.take(found):
            return web.Response(status=answer.status, body=raw, content_type="application/json")
        self._tell(found, usage, 0.0)
        return json_response(found)

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, ticket: Ticket, arrived: float, shows_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        usage, began, last, is_over = AnswerUsage(), 0.0, 0.0, False
        try:
            async for one in read_events(answer.content.iter_any()):
                found = {} if one.data is None or one.is_done else event_of(one.data)
                raw, is_over = one.raw, is_over or one.is_done or found.get("error") is not None
                if found.get("choices"):
                    last = time.monotonic()
                    if not began:
                        began, ticket.prompt_left = last, 0
                        self.metrics.ttft.observe(began - arrived)
                    ticket.new_left = max(0, ticket.new_left - 1)
                if usage.take(found):
                    self._tell(found, usage, began - arrived)
                    raw = event(found)
                    if not shows_usage and not found.get("choices"):
                        continue
                if not response.prepared:
                    await to_client(response.prepare(request))
                await to_client(response.write(raw))
            if not is_over:
                raise ValueError("the stream ended early")
        except (*LOST, ValueError) as error:
            if not response.prepared:
                raise EngineGone(f"vLLM at {self.engine.url} has broken off its answer") from None
            why = f"vLLM has broken off its answer ({type(error).__name__})"
            lost = ApiError(502, why, kind="server_error", code="engine_lost")
            await to_client(response.write(event(lost.body)))
        if usage.new is not None and usage.new > 1:
            self.metrics.per_token.observe((last - began) / (usage.new - 1))
        if not response.prepared:
            await to_client(response.prepare(request))
        await to_client(response.write_eof())
        return response

    def _tell(self, answer: dict[str, Any], usage: AnswerUsage, ttft_s: float) -> None:
        """Put into an answer who gave it. Which tiers its cached tokens came from vLLM tells of all requests only."""
        answer["kvstore"] = {"replica": self.name, "cached_tokens": usage.cached, "ttft_s": round(ttft_s, 6)}

    def _check_fits(self, path: str, prompt_tokens: int, new_tokens: int) -> None:
        limit = self.settings.max_tokens
        if prompt_tokens + new_tokens > limit:
            field = "messages" if path == CHAT else "prompt"
            raise ApiError(
                400,
                f"{field} has {prompt_tokens} tokens and the answers may have {new_tokens}; together no more than "
                f"{limit} are ever let in here (--max-tokens-queued)",
                param=field,
                code="context_length_exceeded",
            )

    def _check_open(self) -> None:
        if self.is_draining:
            raise ApiError(503, "the replica is ending", kind="server_error", code="not_ready", retry_after_s=RETRY_S)

    # ---- the rest ---------------------------------------------------------------------------------------------------

    async def _lookup(self, request: web.Request) -> web.Response:
        """The tokens that this replica would have to compute for a request, by an estimate; for routers."""
        self._check_open()
        body = parse_object(await read_body(request, self.bodies))
        extension = take_extension(body)
        tokens = await self.engine.tokenize(body, is_chat="messages" in body)
        if tokens is None:
            raise ApiError(400, "the prompt's tokens are not known here", param="prompt")
        hits = self._seen.common(tokens, salt_of(body, extension)) if extension.cache else 0
        queued = self.books.admission.tokens_left
        return json_response({"prompt_tokens": len(tokens), "hit_tokens": hits, "queued_tokens": queued})

    async def _stats(self, request: web.Request) -> web.Response:
        admission = self.books.admission
        return json_response(
            {
                "replica": self.name,
                "models": list(self.engine.models),
                "running": self.books.num_running,
                "queued": self.books.num_queued,
                "held_tokens": admission.tokens,
                "max_tokens": admission.max_tokens,
                "max_queue": admission.max_queue,
                "refusals": dict(admission.refusals),
                "prefill_tokens_per_s": round(admission.prefill.tokens_per_s, 1),
                "decode_tokens_per_s": round(admission.decode.tokens_per_s, 1),
            }
        )

    async def _healthz(self, request: web.Request) -> web.Response:
        return json_response({"name": self.name})

    async def _readyz(self, request: web.Request) -> web.Response:
        is_ready = self._is_well and not self.is_draining
        return json_response({"name": self.name, "ready": is_ready}, status=200 if is_ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Ours, and vLLM's own as they were a second ago."""
        ours = await asyncio.to_thread(generate_latest, self.metrics.registry)
        return web.Response(body=ours + self._engine_text.encode(), headers={"Content-Type": CONTENT_TYPE})

    def error_of(self, error: Exception) -> ApiError | None:
        """A refusal, or an engine that is gone."""
        if isinstance(error, Refused):
            wait_s = error.retry_after_s
            return ApiError(429, str(error), kind="rate_limit_error", code=error.reason, retry_after_s=wait_s)
        if isinstance(error, (EngineGone, *LOST)):
            self._is_well = False
            why = str(error) if isinstance(error, EngineGone) else f"vLLM at {self.engine.url} cannot be reached"
            return ApiError(503, why, kind="server_error", code="engine_gone", retry_after_s=RETRY_S)
        return None


def serve(
    settings: VllmFrontSettings,
    url: str,
    announce: Callable[[str], None],
    *,
    api_key: str = "",
    ended: Callable[[], str] = lambda: "",
) -> None:
    """Run a front before the vLLM server at `url` until it is told to stop."""

    async def run() -> None:
        await VllmFront(settings, VllmEngine(url, api_key)).run(announce, ended)

    asyncio.run(run())
