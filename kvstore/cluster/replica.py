"""The process behind `kvstore replica`: an OpenAI-compatible server on one model, with a prefix cache behind it.

It listens at once and is ready when the model is loaded and warm. Nothing of an answer is sent before its first token
is known, so until then an error has a status of its own and a router may try elsewhere.

The end, on SIGTERM or SIGINT: new requests get a 503, those inside are finished (for `drain_s`), what was saved is
written behind, and the process exits with 0.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from connectors.transformers.runner import Job
from connectors.transformers.runner import ModelSpec as ModelSpec  # for whoever makes settings
from kvstore import logs
from kvstore.cluster.admission import Admission, Refused
from kvstore.cluster.answer import ReplicaAnswer
from kvstore.cluster.engine import Engine
from kvstore.cluster.http import Site, error_response, json_response, of_library, read_body
from kvstore.cluster.openai import ApiError, Ask, ChatAsk, CompletionAsk, Reply, check_model, event, models, parse
from kvstore.cluster.watch import PrefixWatch, WatchCollector
from kvstore.config.sections import Config
from kvstore.errors import KVStoreError, RequestError, StoreClosed
from kvstore.metrics import CONTENT_TYPE
from kvstore.plan.records import HOST, RequestOptions
from kvstore.tiers import registry
from kvstore.web.bodies import Bodies

log = logs.limited(__name__)

TIERS = (HOST, *registry.names())
COMPLETION_TOKENS = 16  # where a request does not say; OpenAI's own default
CHAT_TOKENS = 512  # likewise; OpenAI generates until the model ends, which a random model never does
STATS_TIMEOUT_S = 5.0
ANSWERS: dict[str, type[Ask]] = {"/v1/completions": CompletionAsk, "/v1/chat/completions": ChatAsk}
NAME_HEADER = "X-KVStore-Replica"


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """The settings of a replica.

    port:        0 takes any free one.
    max_queue:   requests that may wait.
    max_running: requests computed in turns, each with a KV cache of its own.
    max_tokens:  prompt and answer tokens of all requests inside.
    drain_s:     at the end, longest wait for those inside.
    watches:     whether it follows where sessions leave their prefix.
    """

    name: str
    host: str
    port: int
    model: ModelSpec
    max_queue: int = 64
    max_running: int = 8
    max_tokens: int = 65536
    drain_s: float = 30.0
    watches: bool = False


class ReplicaServer:
    """The application. Its event loop only."""

    def __init__(self, settings: ReplicaSettings, config: Config) -> None:
        self.settings = settings
        self.engine = Engine(
            settings.model, config, Admission(settings.max_queue, settings.max_tokens), settings.max_running
        )
        self.is_ready = False
        self.is_draining = False
        self._created = int(time.time())
        self._stop = asyncio.Event()
        self._bodies = Bodies()
        self.rendering = ""  # the fingerprint of its chat template's engine; once it is ready
        self.watch = PrefixWatch(settings.model.source) if settings.watches else None
        app = web.Application(middlewares=[self._middleware])
        app.on_response_prepare.append(self._sign)
        app.router.add_get("/v1/models", self._models)
        for path, kind in ANSWERS.items():
            app.router.add_post(path, self._answer(kind))
        app.router.add_post("/v1/lookup", self._lookup)
        app.router.add_get("/v1/stats", self._stats)
        if self.watch is not None:
            app.router.add_get("/v1/prefix", self._prefix)
            WatchCollector(self.watch, "kvstore_replica").register(self.engine.metrics.registry)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self.site = Site(app, settings.host, settings.port)

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM, SIGINT or `stop`. Raises ConfigError for the port, and what loading the model raises."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            await self.site.start()
            spec = self.settings.model
            announce(f"{self.settings.name} on {self.site.url}: loading {spec.name} ({spec.dtype})")
            began = time.monotonic()
            await self.engine.open()
            self.rendering = self.engine.runner.rendering
            self.is_ready = True
            announce(f"{self.settings.name} on {self.site.url}: ready after {time.monotonic() - began:.1f} s")
            await self._stop.wait()
        finally:
            await self.close()

    def stop(self) -> None:
        """Make `run` come to its end."""
        self._stop.set()

    async def close(self) -> None:
        """Drain, flush, hang up. Idempotent."""
        self.is_draining, self.is_ready = True, False
        await self.engine.close(self.settings.drain_s)
        await self.site.close()
        if self.watch is not None:
            await asyncio.to_thread(self.watch.close)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, kind: type[Ask]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            arrived = time.monotonic()
            self._check_open()
            raw = await read_body(request, self._bodies)
            ask = parse(raw, kind)
            check_model(ask.model, self.settings.model.name)
            if self.watch is not None:
                self.watch.saw(raw)
            self.engine.admission.check_queue(self.engine.num_queued)
            job = await self._job(ask)
            self._check_open()
            answer = self.engine.submit(job, arrived)
            try:
                reply = Reply(ask, self.settings.model.name, len(job.tokens))
                return await (self._stream if ask.stream else self._whole)(request, answer, reply)
            finally:
                self.engine.cancel(answer)

        return handle

    async def _whole(self, request: web.Request, answer: ReplicaAnswer, reply: Reply) -> web.StreamResponse:
        pieces = [piece async for piece in answer]
        text, reason = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
        report = answer.report
        return json_response(
            reply.whole(text, reason, report.new_tokens, report.reused_tokens, self._extension(answer))
        )

    async def _stream(self, request: web.Request, answer: ReplicaAnswer, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            async for piece in answer:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(reply.chunk(piece.text, piece.finish_reason))
        except ConnectionError:
            raise
        except Exception as error:
            if not response.prepared:
                raise
            await response.write(event(self._error(error).body))  # the status is sent already
        else:
            report = answer.report
            await response.write(reply.end(report.new_tokens, report.reused_tokens, self._extension(answer)))
        await response.write_eof()
        return response

    def _extension(self, answer: ReplicaAnswer) -> dict[str, Any]:
        report = answer.report
        told = {"hints": [outcome.as_json() for outcome in report.outcomes]} if report.outcomes else {}
        return {
            "replica": self.settings.name,
            **told,
            "hit_tokens": {tier: report.by_tier.get(tier, 0) for tier in TIERS},
            "queue_s": round(answer.queue_s, 6),
            "load_s": round(report.load_s, 6),
            "compute_wait_s": round(report.compute_wait_s, 6),
            "prefill_s": round(report.prefill_s, 6),
            "decode_s": round(report.decode_s, 6),
            "ttft_s": round(answer.ttft_s, 6),
            "unsaved_pages": report.unsaved_pages,
        }

    async def _job(self, ask: Ask) -> Job:
        """The job of a request. Raises ApiError 400 if it can never fit."""
        hints = ask.hints
        if isinstance(ask, ChatAsk):
            field, default = "messages", CHAT_TOKENS
            tokens = await self.engine.encode([message.plain for message in ask.messages])
            if (breakpoints := await self.engine.breakpoints(ask.messages, tokens)) is not None:
                hints.append(breakpoints)
        else:
            assert isinstance(ask, CompletionAsk)
            field, default = "prompt", COMPLETION_TOKENS
            tokens = ask.prompt if isinstance(ask.prompt, list) else await self.engine.encode(ask.prompt)
        limit = self.settings.max_tokens
        if self.engine.runner.max_tokens is not None:
            limit = min(limit, self.engine.runner.max_tokens)
        new_tokens = ask.new_tokens or max(1, min(default, limit - len(tokens)))
        if len(tokens) + new_tokens > limit:
            raise ApiError(
                400,
                f"{field} has {len(tokens)} tokens and the answer may have {new_tokens}; together no more than {limit} "
                "fit here",
                param=field,
                code="context_length_exceeded",
            )
        extension = ask.kvstore
        return Job(
            tokens,
            new_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=max(0, ask.top_k),
            seed=ask.seed,
            stop=tuple(ask.stop),
            ignore_eos=ask.ignore_eos,
            use_store=extension.cache,
            last_turn=extension.last_turn,
            finish_reason=extension.finish_reason,
            options=RequestOptions(
                tenant=extension.tenant,
                session=extension.session,
                priority=extension.priority,
                ttl_s=extension.ttl_s,
                retain_until=extension.retain_until,
            ),
            hints=tuple(hints),
        )

    async def _lookup(self, request: web.Request) -> web.Response:
        """The tokens that this replica would have to compute for a request; for routers."""
        self._check_open()
        raw = await read_body(request, self._bodies)
        ask = parse(raw, ChatAsk if _is_chat(raw) else CompletionAsk)
        check_model(ask.model, self.settings.model.name)
        job = await self._job(ask)
        by_tier = (await self.engine.lookup(job)).by_tier if job.use_store else {}
        return json_response(
            {
                "prompt_tokens": len(job.tokens),
                "hit_tokens": sum(by_tier.values()),
                "by_tier": {tier: by_tier.get(tier, 0) for tier in TIERS},
                "shared_tokens": registry.over_network(by_tier),
                "queued_requests": self.engine.num_queued,
                "queued_tokens": self.engine.admission.tokens_left,
            }
        )

    # ---- about itself -----------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        return json_response(models(self.settings.model.name, self._created))

    async def _stats(self, request: web.Request) -> web.Response:
        self._check_open()
        engine, admission = self.engine, self.engine.admission
        try:
            store: dict[str, Any] | None = await asyncio.wait_for(engine.stats(), STATS_TIMEOUT_S)
        except (KVStoreError, asyncio.TimeoutError) as error:
            log.warning("the store gives no numbers: %s", type(error).__name__)
            store = None
        return json_response(
            {
                "replica": self.settings.name,
                "model": self.settings.model.name,
                "rendering": self.rendering,
                "saved_answers": self.engine.runner.saved_answers,
                "running": engine.num_running,
                "queued": engine.num_queued,
                "held_tokens": admission.tokens,
                "max_tokens": admission.max_tokens,
                "max_queue": admission.max_queue,
                "refusals": dict(admission.refusals),
                "prefill_tokens_per_s": round(admission.prefill.tokens_per_s, 1),
                "decode_tokens_per_s": round(admission.decode.tokens_per_s, 1),
                "store": store,
            }
        )

    async def _healthz(self, request: web.Request) -> web.Response:
        return json_response({"name": self.settings.name}, status=200 if self.engine.is_alive else 503)

    async def _readyz(self, request: web.Request) -> web.Response:
        is_ready = self.is_ready and self.engine.is_alive
        state = "ready" if is_ready else "closing" if self.is_draining else "loading"
        body = {"name": self.settings.name, "state": state, "rendering": self.rendering}
        return json_response(body, status=200 if is_ready else 503)

    async def _prefix(self, request: web.Request) -> web.Response:
        assert self.watch is not None
        return json_response(self.watch.as_json())

    async def _metrics(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(self.engine.metrics.render)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    # ---- every request ----------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.is_ready and self.engine.is_alive:
            return
        why = "is closing" if self.is_draining else "has failed" if self.is_ready else "is loading its model"
        raise ApiError(503, f"{self.settings.name} {why}", kind="server_error", code="not_ready", retry_after_s=1)

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except ConnectionError:
            raise asyncio.CancelledError from None  # the client is gone: nobody is there to be answered
        except Exception as error:
            response = error_response(request, of_library(request, error) or self._error(error))
        if request.path in ANSWERS:
            self.engine.metrics.requests.labels(str(response.status)).inc()
        return response

    def _error(self, error: Exception) -> ApiError:
        match error:
            case ApiError():
                return error
            case Refused():
                return ApiError(
                    429,
                    str(error),
                    kind="rate_limit_error",
                    code=error.reason,
                    retry_after_s=error.retry_after_s,
                )
            case RequestError():
                return ApiError(400, str(error), param=str(error).split(":", 1)[0].split(" ", 1)[0])
            case StoreClosed():
                return ApiError(503, str(error), kind="server_error", code="not_ready", retry_after_s=1)
        log.error("a request failed: %s", logs.where(error))  # not its text: that may hold a prompt
        return ApiError(500, "a fault in the replica; its log has more", kind="server_error")

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers[NAME_HEADER] = self.settings.name


def _is_chat(raw: bytes) -> bool:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return False  # the parser says what is wrong with it
    return isinstance(body, dict) and "messages" in body


def serve(settings: ReplicaSettings, config: Config, announce: Callable[[str], None]) -> None:
    """Run a replica until it is told to stop."""

    async def run() -> None:
        await ReplicaServer(settings, config).run(announce)

    asyncio.run(run())
