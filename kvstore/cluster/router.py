"""The process behind `kvstore router`: one address for several replicas.

It forwards OpenAI's paths, knows nothing of requests (relay.py) and keeps nothing, so it can be restarted at any time.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from kvstore import logs
from kvstore.cluster.http import Site, error_response, json_response, of_library, read_body
from kvstore.cluster.metrics import RouterMetrics
from kvstore.cluster.openai import ApiError
from kvstore.cluster.relay import ClientGone, Relay, TryNext
from kvstore.cluster.replicas import NOT_THERE, ReplicaLink, Replicas, check_urls
from kvstore.cluster.routing import Policy, ReplicaView, make_policy
from kvstore.cluster.watch import PrefixWatch, WatchCollector
from kvstore.metrics import CONTENT_TYPE
from kvstore.web.bodies import Bodies

log = logs.limited(__name__)


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The settings of a router.

    port:              0 takes any free one.
    lookup_deadline_s: longest wait for the replicas' views of a request; who has not answered by then comes last.
    health_interval_s: between two questions to a replica whether it is ready.
    watch:             model or template by which to follow where sessions leave their prefix, or "plain"; "" is off.
    """

    replicas: Sequence[str]
    policy: str
    host: str
    port: int
    lookup_deadline_s: float = 0.5
    health_interval_s: float = 0.5
    watch: str = ""


class Router:
    """The application. Its event loop only."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.policy: Policy = make_policy(settings.policy)
        self.replicas = Replicas(check_urls(settings.replicas), settings.health_interval_s)
        self.metrics = RouterMetrics(self.replicas.links)
        self._stop = asyncio.Event()
        self._bodies = Bodies()
        self.watch = PrefixWatch(settings.watch) if settings.watch else None
        app = web.Application(middlewares=[self._middleware])
        app.router.add_post("/v1/completions", self._forward)
        app.router.add_post("/v1/chat/completions", self._forward)
        app.router.add_get("/v1/models", self._forward)
        app.router.add_get("/v1/replicas", self._replicas)
        if self.watch is not None:
            app.router.add_get("/v1/prefix", self._prefix)
            WatchCollector(self.watch, "kvstore_router").register(self.metrics.registry)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self.site = Site(app, settings.host, settings.port)

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM, SIGINT or `stop`. Raises ConfigError if the port cannot be had."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            await self.start()
            ready = len(self.replicas.ready)
            announce(
                f"router on {self.site.url}: {self.policy.name}, {ready} of {len(self.replicas.links)} replicas ready"
            )
            await self._stop.wait()
        finally:
            await self.close()

    async def start(self) -> None:
        """Look who is there, and listen."""
        await self.replicas.start()
        await self.site.start()

    def stop(self) -> None:
        """Make `run` come to its end."""
        self._stop.set()

    async def close(self) -> None:
        """Hang up. Idempotent."""
        await self.site.close()
        await self.replicas.close()
        if self.watch is not None:
            await asyncio.to_thread(self.watch.close)

    # ---- forwarding -------------------------------------------------------------------------------------------------

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        raw = await read_body(request, self._bodies) if request.can_read_body else b""
        if self.watch is not None and raw:
            self.watch.saw(raw)
        relay = Relay(request, raw, self.replicas.session)
        links = await self._order(request.path, raw)
        why = f"none of the {len(self.replicas.links)} replicas is ready" if not links else ""
        for link in links:
            if relay.has_begun:  # another one would say something else
                break
            try:
                response = await relay.ask(link)
            except TryNext as failed:
                log.info("%s: %s", link.name, failed)
                self.metrics.retries.labels(link.name, failed.reason).inc()
                why = f"{link.name}: {failed}"
            else:
                self.metrics.answered(link, response.status, time.monotonic() - began)
                return response
        if relay.has_begun:
            self.metrics.broken.inc()
        response = await relay.give_up(why)
        self.metrics.requests.labels("none", str(response.status)).inc()
        return response

    async def _order(self, path: str, raw: bytes) -> list[ReplicaLink]:
        links = {link.url: link for link in self.replicas.ready}
        views: dict[str, ReplicaView] = {}
        if self.policy.asks and raw and len(links) > 1:
            began = time.monotonic()
            answers = await asyncio.gather(*(self._view(link, raw) for link in links.values()))
            views = {url: view for url, view in zip(links, answers, strict=True) if view is not None}
            self.metrics.lookup.observe(time.monotonic() - began)
        order = [links[url] for url in self.policy.order(list(links), views)]
        if order and order[0].url in views:
            order[0].hit_tokens += views[order[0].url].hit_tokens
        return order

    async def _view(self, link: ReplicaLink, raw: bytes) -> ReplicaView | None:
        """How a replica sees a request; None if it does not say in time, or finds the request wrong."""
        timeout = aiohttp.ClientTimeout(total=self.settings.lookup_deadline_s)
        headers = {"Content-Type": "application/json"}
        try:
            url = f"{link.url}/v1/lookup"
            async with self.replicas.session.post(url, data=raw, headers=headers, timeout=timeout) as answer:
                body = json.loads(await answer.read())
                if answer.status == 200:
                    prompt, hits, queued = (int(body[f"{name}_tokens"]) for name in ("prompt", "hit", "queued"))
                    return ReplicaView(prompt, hits, queued, int(body.get("shared_tokens", 0)))
        except (*NOT_THERE, asyncio.TimeoutError, ValueError, KeyError, TypeError):
            link.num_silent_lookups += 1
        return None

    # ---- about itself -----------------------------------------------------------------------------------------------

    async def _replicas(self, request: web.Request) -> web.Response:
        return json_response([link.as_json() for link in self.replicas.links])

    async def _prefix(self, request: web.Request) -> web.Response:
        assert self.watch is not None
        return json_response(self.watch.as_json())

    async def _healthz(self, request: web.Request) -> web.Response:
        return json_response({"policy": self.policy.name})

    async def _readyz(self, request: web.Request) -> web.Response:
        num_ready = len(self.replicas.ready)
        body = {"ready": num_ready, "replicas": len(self.replicas.links)}
        return json_response(body, status=200 if num_ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
            return response
        except ApiError as error:
            return error_response(request, error)
        except (ConnectionError, ClientGone):
            raise asyncio.CancelledError from None  # nobody is there to be answered
        except Exception as error:
            told = of_library(request, error)
            if told is None:
                log.error("a request failed: %s", logs.where(error))
                told = ApiError(500, "a fault in the router; its log has more", kind="server_error")
            return error_response(request, told)


def serve(settings: RouterSettings, announce: Callable[[str], None]) -> None:
    """Run a router until it is told to stop."""

    async def run() -> None:
        await Router(settings).run(announce)

    asyncio.run(run())
