"""The HTTP side that fronts before engines' servers have in common: life, signature, counting, what is passed on.

A front is a replica of the cluster whose engine is another program (`kvstore vllm`, `kvstore llamacpp`).
"""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from kvstore import logs
from kvstore.cluster.http import Site, error_response, of_library, read_body
from kvstore.cluster.metrics import ReplicaMetrics
from kvstore.cluster.openai import ApiError
from kvstore.cluster.relay import NAME_HEADER, ClientGone
from kvstore.errors import KVStoreError
from kvstore.web.bodies import Bodies

log = logs.limited(__name__)

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LOOK_S = 1.0  # between looks at a server that was started here
RETRY_S = 1
# Lost while waiting for the server's answer, or in the middle of it.
LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)


class FrontedServer(Protocol):
    """An engine's server."""

    @property
    def url(self) -> str:
        """Its address, without a path."""

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to it."""


class EngineFront(ABC):
    """The application. Its event loop only. app: subclasses add what is theirs."""

    def __init__(self, name: str, host: str, port: int, before: FrontedServer, metrics: ReplicaMetrics) -> None:
        self.name = name
        self.metrics = metrics
        self.bodies = Bodies()
        self.app = web.Application(middlewares=[self._middleware])
        self.app.on_response_prepare.append(self._sign)
        self.site = Site(self.app, host, port)
        self._before = before
        self._stop = asyncio.Event()

    @abstractmethod
    async def open(self) -> str:
        """Find out what the server is, and listen; return what to tell of that. Raises ConfigError."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what is under way, stop listening, hang up. Idempotent."""

    @abstractmethod
    def error_of(self, error: Exception) -> ApiError | None:
        """The form of an error that a handler has raised; None for a fault of ours."""

    async def run(self, announce: Callable[[str], None], ended: Callable[[], str] = lambda: "") -> None:
        """Serve until SIGTERM, SIGINT or `stop`. ended: why there is no sense in going on; "" while there is.

        Raises ConfigError for the port and for a server that cannot be used, KVStoreError where `ended` says why.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            announce(await self.open())
            stop = asyncio.ensure_future(self._stop.wait())
            while not (await asyncio.wait([stop], timeout=LOOK_S))[0]:
                if why := ended():
                    raise KVStoreError(why)
        finally:
            await self.close()

    def stop(self) -> None:
        """Make `run` come to its end."""
        self._stop.set()

    def add_passed_on(self, *, reads: Sequence[str] = (), posts: Sequence[str] = ()) -> None:
        """Have the server itself answer at these paths."""
        for path in reads:
            self.app.router.add_get(path, self._pass_on)
        for path in posts:
            self.app.router.add_post(path, self._pass_on)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self.bodies) if request.method == "POST" else None
        headers = {"Content-Type": "application/json"} if raw is not None else {}
        url = self._before.url + request.path
        async with self._before.session.request(request.method, url, data=raw, headers=headers) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers[NAME_HEADER] = self.name

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except (ClientGone, ConnectionResetError):
            raise asyncio.CancelledError from None  # nobody is there to be answered
        except ApiError as error:
            response = error_response(request, error)
        except Exception as error:
            told = of_library(request, error) or self.error_of(error)
            if told is None:
                log.error("a request failed: %s", logs.where(error))  # not its text: that may hold a prompt
                told = ApiError(500, "a fault in the front; its log has more", kind="server_error")
            response = error_response(request, told)
        if request.path in (CHAT, COMPLETION):
            self.metrics.requests.labels(str(response.status)).inc()
        return response
