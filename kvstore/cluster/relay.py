"""One client's request on its way to the replicas, until one of them has answered it.

    before the first byte   a replica that cannot be reached, says 503 or dies: the next one; 429: the others first
    in the middle           an error event that says what happened, and the end of the stream

A stream is passed on event by event, never half of one: what the client has is what one replica said. Other answers are
read whole before they are sent, so that they can be tried again too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import aiohttp
from aiohttp import web

from kvstore.cluster.http import error_response
from kvstore.cluster.openai import ApiError
from kvstore.cluster.openai import event as to_event
from kvstore.cluster.replicas import NOT_THERE, ReplicaLink
from kvstore.logs import mask
from kvstore.web.sse import ServerEvent, read_events

NAME_HEADER = "X-KVStore-Replica"
SENT_ON = ("Content-Type", "Authorization", "X-Request-Id")  # of the request
SENT_BACK = ("Content-Type", "Cache-Control", "Retry-After", NAME_HEADER)  # of the answer
MAX_RETRY_S = 3600


class TryNext(Exception):
    """This replica has not answered. reason: one word, for counting."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class BrokenStream(Exception):
    """A stream that ended early, reported an error, or brought something else than events."""


class ClientGone(Exception):
    """Nobody listens any more."""


class Relay:
    """One request. `ask` replicas one after another until one call returns; `give_up` when all have failed."""

    def __init__(self, request: web.Request, raw: bytes, session: aiohttp.ClientSession) -> None:
        self._request = request
        self._raw = raw
        self._session = session
        self._response: web.StreamResponse | None = None
        self._refusals: list[tuple[int, bytes, dict[str, str]]] = []

    @property
    def has_begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._response is not None

    async def ask(self, link: ReplicaLink) -> web.StreamResponse:
        """Ask `link` for the answer. Raises TryNext; another one may be asked then unless the answer `has_begun`."""
        link.num_requests += 1
        link.in_flight += 1
        attempt = asyncio.ensure_future(self._ask(link))
        ends: set[asyncio.Future[Any]] = {attempt, link.lost}
        try:
            # The replica may be lost without its connection breaking: hung, or its machine gone.
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not attempt.done():
                raise TryNext("silent", "it does not answer any more")
            return attempt.result()
        except TryNext as failed:
            if failed.reason == "refused":
                link.num_refusals += 1
            else:
                link.num_failures += 1
                if failed.reason != "broken":  # that is one answer's fault, and may be the request's
                    link.down(str(failed))
            raise
        finally:
            link.in_flight -= 1
            if not attempt.done():
                attempt.cancel()
                await asyncio.gather(attempt, return_exceptions=True)

    async def give_up(self, why: str) -> web.StreamResponse:
        """The error for the client when no replica is left to ask."""
        if self._response is not None:
            error = ApiError(502, f"the answer was cut short: {why}", kind="server_error", code="replica_lost")
            await to_client(self._response.write(to_event(error.body)))
            await to_client(self._response.write_eof())
            return self._response
        if self._refusals:
            _, body, headers = min(self._refusals, key=lambda refusal: refusal[0])
            return web.Response(status=429, body=body, headers=headers)
        error = ApiError(503, why, kind="server_error", code="no_replica", retry_after_s=1)
        return error_response(self._request, error)

    async def _ask(self, link: ReplicaLink) -> web.StreamResponse:
        headers = {name: self._request.headers[name] for name in SENT_ON if name in self._request.headers}
        url = link.url + self._request.path
        try:
            async with self._session.request(self._request.method, url, data=self._raw, headers=headers) as answer:
                kept = {name: answer.headers[name] for name in SENT_BACK if name in answer.headers}
                if answer.content_type == "text/event-stream" and answer.status == 200:
                    return await self._stream(answer, kept)
                body = await answer.read()
        except BrokenStream as error:
            raise TryNext("broken", str(error)) from None
        except asyncio.TimeoutError:
            raise TryNext("unreachable", "no connection in time") from None
        except NOT_THERE as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise TryNext("unreachable", mask(str(error))) from None
            raise TryNext("died", f"its connection broke ({type(error).__name__})") from None
        if answer.status == 503:
            raise TryNext("not_ready", "it answers 503")
        if answer.status == 429:
            self._refusals.append((_seconds(kept.get("Retry-After", "")), body, kept))
            raise TryNext("refused", "it refuses")
        return web.Response(status=answer.status, body=body, headers=kept)

    async def _stream(self, answer: aiohttp.ClientResponse, headers: dict[str, str]) -> web.StreamResponse:
        is_done = False
        try:
            async for event in read_events(answer.content.iter_any()):
                is_done = is_done or _is_last(event)
                if self._response is None:
                    response = web.StreamResponse(headers=headers)
                    await to_client(response.prepare(self._request))
                    self._response = response
                await to_client(self._response.write(event.raw))
        except ValueError as error:
            raise BrokenStream(str(error)) from None
        if self._response is None or not is_done:
            raise BrokenStream("its stream ended early")
        await to_client(self._response.write_eof())
        return self._response


async def to_client(sending: Awaitable[object]) -> None:
    """Send; a client that is gone must not be taken for a replica that is."""
    try:
        await sending
    except ConnectionError as error:
        raise ClientGone from error


def _is_last(event: ServerEvent) -> bool:
    """Whether the answer is complete with this event. Raises BrokenStream if it reports an error."""
    if event.data is None or event.is_done:
        return event.is_done
    error = event.as_json().get("error")
    if error is not None:
        raise BrokenStream(str(error.get("message") if isinstance(error, dict) else error)[:300])
    return False


def _seconds(text: str) -> int:
    return min(int(text), MAX_RETRY_S) if text.isdigit() else MAX_RETRY_S
