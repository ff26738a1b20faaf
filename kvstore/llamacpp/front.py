"""An OpenAI-compatible server before one llama-server: it restores what is stored of a prompt, forwards, and saves.

A request goes on as it came, but for the slot that it is to run in; an answer comes back as it is, with one object
more, "kvstore". A request that the store can do nothing for (images, an adapter of its own, another use of the cache)
is forwarded all the same. Whatever generates without going through here is not served, because its slots could be ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from prometheus_client import Counter, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from connectors.llamacpp.states import Tokens
from kvstore import logs
from kvstore.base import HOST, RequestOptions
from kvstore.cluster.bodies import as_object, take_extension
from kvstore.cluster.front import CHAT, COMPLETION, LOST, RETRY_S, EngineFront
from kvstore.cluster.http import json_response, read_body
from kvstore.cluster.metrics import ENGINE, ReplicaMetrics
from kvstore.cluster.openai import ApiError, event
from kvstore.cluster.relay import to_client
from kvstore.config.sections import Config
from kvstore.errors import KVStoreError, RequestError
from kvstore.llamacpp.requests import Counts, counts_of, is_plain, parse_body
from kvstore.llamacpp.seat import LlamaSeat, LlamaTurn
from kvstore.llamacpp.server import LlamaServer, ServerGone, ServerRefused
from kvstore.metrics import CONTENT_TYPE, StoreCollector
from kvstore.tiers import registry
from kvstore.web.sse import read_events

log = logs.limited(__name__)

TIERS = (HOST, *registry.names())
PASSED_ON = ("/tokenize", "/detokenize", "/apply-template")
READ = ("/v1/models", "/props", "/lora-adapters")  # not /slots: some builds tell the prompts in them, of every tenant
MAX_WAITING = 256  # requests that may wait for a slot; more get a 429


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The settings of a front. port: 0 takes any free one. name: how answers, metrics and logs call it."""

    host: str = "127.0.0.1"
    port: int = 8080
    name: str = "llamacpp"
    model: str | None = None
    weights: str = "sampled"


class LlamaFront(EngineFront):
    """The application. Its event loop only."""

    def __init__(self, settings: FrontSettings, seat: LlamaSeat) -> None:
        super().__init__(settings.name, settings.host, settings.port, seat.server, ReplicaMetrics())
        self.seat = seat
        self.server: LlamaServer = seat.server
        self._queued_tokens = 0  # of the prompts inside
        self._registry = self.metrics.registry
        self._tokens = Counter(
            "kvstore_llamacpp_prompt_tokens",
            "Prompt tokens by where they came from: a tier, the slot itself, or computed.",
            ["source"],
            registry=self._registry,
        )
        self._restores = Counter(
            "kvstore_llamacpp_restores",
            "Restored slots, by what the server then took of them.",
            ["effect"],
            registry=self._registry,
        )
        router = self.app.router
        for path in (CHAT, COMPLETION):
            router.add_post(path, self._generate)
        self.add_passed_on(reads=READ, posts=PASSED_ON)
        for path in ("/health", "/healthz", "/readyz"):
            router.add_get(path, self._health)
        router.add_post("/v1/lookup", self._lookup)
        router.add_get("/v1/stats", self._stats)
        router.add_get("/metrics", self._metrics)

    async def open(self) -> str:
        """Identify the server, open the store, listen. Raises ConfigError for a server that cannot be used."""
        await self.seat.open()
        store = self.seat.served.states
        if store is not None:
            self._registry.register(_OfStore(self.seat))
        await self.site.start()
        off = self.seat.served.why_not
        return f"OpenAI API on {self.site.url}/v1, before {self.server.url}" + (f"; {off}" if off else "")

    async def close(self) -> None:
        """Stop listening, finish saves, close the store, hang up. Idempotent."""
        await self.site.close()
        await self.seat.close()
        await self.server.close()

    # ---- generating -------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = parse_body(await read_body(request, self.bodies))
        extension = take_extension(body)
        if self.seat.served.slots.num_waiting >= MAX_WAITING:
            why = f"{MAX_WAITING} requests wait for a slot"
            raise ApiError(429, why, kind="rate_limit_error", code="queue_full", retry_after_s=RETRY_S)
        options = RequestOptions(tenant=extension.tenant, session=extension.session, last_turn=extension.last_turn)
        tokens = await self._tokens_of(request.path, body) if extension.cache and is_plain(body) else None
        num_tokens = 0 if tokens is None else len(tokens)
        self._queued_tokens += num_tokens
        try:
            turn = await self.seat.begin(tokens, options)
            return await self._run(request, body, tokens, turn)
        finally:
            self._queued_tokens -= num_tokens

    async def _run(
        self, request: web.Request, body: dict[str, Any], tokens: Tokens | None, turn: LlamaTurn
    ) -> web.StreamResponse:
        is_over = False
        try:
            body.update(id_slot=turn.slot.id, n_cache_reuse=0)
            if tokens is not None and request.path != CHAT:
                body["prompt"] = tokens.tolist()  # the server has cut the text once, for us
            if tokens is not None or not turn.may_reuse:
                body["cache_prompt"] = turn.may_reuse
            response, counts = await self._forward(request, body, turn)
            is_over = True
        except LOST:
            self.seat.is_lost()
            raise ServerGone(f"llama-server at {self.server.url} has broken off its answer") from None
        finally:
            if not is_over:
                self.seat.give_up(turn, was_cancelled=True)
        if counts is None:
            self.seat.give_up(turn)
        else:
            self._count(turn, counts)
            self.seat.end(turn, counts)
        return response

    async def _tokens_of(self, path: str, body: Mapping[str, Any]) -> Tokens | None:
        """The tokens of the prompt as the server will have them; None where it cannot tell."""
        try:
            if path == CHAT:
                tokens = await self.server.tokenize(await self.server.render(body))
            else:
                prompt = body.get("prompt")
                if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
                    prompt = prompt[0]
                if isinstance(prompt, list) and all(type(token) is int for token in prompt):
                    tokens = prompt
                elif isinstance(prompt, str):
                    tokens = await self.server.tokenize(prompt)
                else:
                    return None
            return np.asarray(tokens, np.int32) if tokens and min(tokens) >= 0 else None
        except (ServerRefused, ValueError, OverflowError):
            return None  # the server says itself, of the request, what is wrong with it

    async def _forward(
        self, request: web.Request, body: Mapping[str, Any], turn: LlamaTurn
    ) -> tuple[web.StreamResponse, Counts | None]:
        """The answer, which is sent already where it is a stream; and its counts, None where it failed or has none."""
        async with self.server.session.post(self.server.url + request.path, json=body) as answer:
            if answer.status == 200 and answer.content_type == "text/event-stream":
                return await self._stream(request, answer, turn)
            raw = await answer.read()
        found = as_object(raw) if answer.status == 200 else None
        counts = None if found is None else counts_of(found)
        if found is None or counts is None:
            return web.Response(status=answer.status, body=raw, content_type="application/json"), None
        self._tell(found, turn, counts)
        return json_response(found), counts

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, turn: LlamaTurn
    ) -> tuple[web.StreamResponse, Counts | None]:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        counts: Counts | None = None
        has_begun = is_over = False
        await to_client(response.prepare(request))
        try:
            async for one in read_events(answer.content.iter_any()):
                raw = one.raw
                is_over = is_over or one.is_done or b'"error"' in (one.data or b"")
                if not has_begun and one.data is not None:
                    has_begun = True
                    self.metrics.ttft.observe(monotonic() - turn.arrived)
                if one.data is not None and b'"timings"' in one.data:
                    found = one.as_json()
                    counts = counts_of(found) or counts
                    if counts is not None:
                        self._tell(found, turn, counts)
                        raw = event(found)
                await to_client(response.write(raw))
            if not is_over:
                raise ValueError("the stream ended early")
        except (*LOST, ValueError) as error:
            self.seat.is_lost()
            why = f"llama-server has broken off its answer ({type(error).__name__})"
            lost = ApiError(502, why, kind="server_error", code="server_lost")
            await to_client(response.write(event(lost.body)))
            counts = None
        await to_client(response.write_eof())
        return response, counts

    def _tell(self, answer: dict[str, Any], turn: LlamaTurn, counts: Counts) -> None:
        """Put into an answer what the store has done for it."""
        self.seat.judge(turn, counts)
        restored = turn.written.num_tokens
        answer["kvstore"] = {
            "replica": self.name,
            "hit_tokens": _share(turn.written.by_tier, min(restored, counts.cached)),
            "restored_tokens": restored,
            "restore": "" if turn.effect is None else turn.effect.value,
            "slot": turn.slot.id,
            "load_s": round(turn.restore_s, 6),
        }
        usage = answer.get("usage")
        if isinstance(usage, dict):
            details = usage.get("prompt_tokens_details") or {}
            usage["prompt_tokens_details"] = {**details, "cached_tokens": counts.cached}
            usage["restored_tokens"] = restored

    def _count(self, turn: LlamaTurn, counts: Counts) -> None:
        taken = min(turn.written.num_tokens, counts.cached)
        for source, tokens in (
            *_share(turn.written.by_tier, taken).items(),
            ("slot", counts.cached - taken),
            ("computed", counts.computed),
        ):
            self._tokens.labels(source).inc(tokens)
            if source != "computed":
                self.metrics.hit_tokens.labels(ENGINE if source == "slot" else source).inc(tokens)
        self.metrics.prompt_tokens.inc(counts.cached + counts.computed)
        self.metrics.new_tokens.inc(counts.generated)
        self.metrics.load.inc(turn.restore_s)
        self.metrics.prefill.inc(counts.prefill_s)
        self.metrics.decode.inc(counts.decode_s)
        if turn.effect is not None:
            self._restores.labels(turn.effect.value).inc()

    # ---- the rest ---------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        try:
            await self.server.call("GET", "/health")
        except (KVStoreError, ValueError) as error:
            return json_response({"status": "error", "why": str(error)}, 503)
        return json_response({"status": "ok", "name": self.name})

    async def _lookup(self, request: web.Request) -> web.Response:
        """The tokens that this replica would have to compute for a request; for routers."""
        body = parse_body(await read_body(request, self.bodies))
        extension = take_extension(body)
        tokens = await self._tokens_of(CHAT if "messages" in body else COMPLETION, body)
        if tokens is None:
            raise ApiError(400, "the prompt's tokens are not known here", param="prompt")
        options = RequestOptions(tenant=extension.tenant, session=extension.session)
        hits, shared = await self.seat.held(tokens, options) if extension.cache and is_plain(body) else (0, 0)
        return json_response(
            {
                "prompt_tokens": len(tokens),
                "hit_tokens": hits,
                "shared_tokens": shared,
                "queued_tokens": self._queued_tokens,
            }
        )

    async def _stats(self, request: web.Request) -> web.Response:
        states = self.seat.served.states
        store = None if states is None else await asyncio.to_thread(states.store.stats)
        return json_response({**self.seat.stats(), "store": store})

    async def _metrics(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(generate_latest, self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    def error_of(self, error: Exception) -> ApiError | None:
        """A wrong request, or a server that is gone."""
        if isinstance(error, RequestError):
            return ApiError(400, str(error), param="kvstore")
        if isinstance(error, (ServerGone, *LOST)):
            self.seat.is_lost()
            gone = isinstance(error, ServerGone)
            why = str(error) if gone else f"llama-server at {self.server.url} cannot be reached"
            return ApiError(503, why, kind="server_error", code="server_gone", retry_after_s=RETRY_S)
        return None


class _OfStore(Collector):
    """The metrics of the seat's store, whichever it is."""

    def __init__(self, seat: LlamaSeat) -> None:
        self._seat = seat

    def collect(self) -> Iterator[Metric]:
        """Yield them, if there is a store now."""
        states = self._seat.served.states
        if states is not None:
            yield from StoreCollector(states.store).collect()

    def describe(self) -> Iterable[Metric]:
        """Nothing: it depends on the server."""
        return ()


def _share(by_tier: Mapping[str, int], taken: int) -> dict[str, int]:
    """The first `taken` of the restored tokens, by tier; every tier is named."""
    shares = dict.fromkeys(TIERS, 0)
    for tier, tokens in by_tier.items():
        shares[tier] = min(tokens, taken)
        taken -= shares[tier]
    return shares


def serve(
    settings: FrontSettings,
    config: Config,
    url: str,
    folder: Path,
    announce: Callable[[str], None],
    *,
    api_key: str = "",
    ended: Callable[[], str] = lambda: "",
) -> None:
    """Run a front before the llama-server at `url`, which saves slots in `folder`, until it is told to stop."""

    async def run() -> None:
        seat = LlamaSeat(LlamaServer(url, folder, api_key), config, model=settings.model, weights=settings.weights)
        await LlamaFront(settings, seat).run(announce, ended)

    asyncio.run(run())
