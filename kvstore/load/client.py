"""Asks one OpenAI-compatible server, streaming, and notes when each token came.

A refusal (429) is not an error: it is counted, and asked again when the server says (`Retry-After`) or taken as the
answer. Everything else that is not a whole answer is an error with a kind (what to count) and a detail (what to show).

The hard thing: an answer that ends early looks like one that is short. A stream counts as whole only with its `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import aiohttp

from kvstore.errors import KVStoreError
from kvstore.load.counters import read_hits
from kvstore.load.record import FAILED, OK, REFUSED, Record
from kvstore.load.requests import CHAT
from kvstore.web.sse import read_events

REPLICA_HEADER = "X-KVStore-Replica"
PATHS = {CHAT: "/v1/chat/completions", "completions": "/v1/completions"}
DEFAULT_RETRY_S = 1.0  # where a refusal does not say when to come back
DETAIL_CHARACTERS = 300
# Of a question that a server of another make does not know.
NO_ANSWER = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, TypeError, KeyError, AttributeError)


class Client:
    """One server. Use as `async with`; one event loop, any number of requests at once.

    on_refusal:  "retry" or "count".
    timeout_s:   for a whole request, with its waiting for retries.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key: str = "",
        on_refusal: str = "retry",
        timeout_s: float = 600.0,
        now: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.on_refusal = on_refusal
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._now = now
        self._draw = draw

    async def __aenter__(self) -> Client:
        # No limit: in an open loop nothing may wait for a connection. A new one for each request, as a new user would
        # have; a kept one may have been closed by a server that restarts, and the request would seem to fail.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=self._headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def choose_model(self) -> str:
        """The model to ask for: the given one, checked if the server lists any, or the first one listed.

        Raises KVStoreError with the next step if the server cannot be reached or has no model.
        """
        try:
            async with self._session.get(f"{self.url}/v1/models", timeout=aiohttp.ClientTimeout(total=30)) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            raise KVStoreError(
                f"{self.url} cannot be reached: {_first_line(error)}\n"
                "start a server first, e.g. kvstore cluster up --detach, or name another one with --url"
            ) from error
        listed: list[str] = []
        with suppress(ValueError, TypeError, KeyError):
            listed = [str(model["id"]) for model in json.loads(body)["data"]]
        if answer.status in (401, 403):
            raise KVStoreError(f"{self.url} wants a key ({answer.status}); give it with --api-key")
        if self.model and (not listed or self.model in listed):
            return self.model
        if not listed:
            raise KVStoreError(
                f"{self.url}/v1/models names no model (HTTP {answer.status}); is this an OpenAI-compatible server? "
                "name the model with --model if it is"
            )
        if self.model:
            raise KVStoreError(f"{self.url} has no model {self.model!r}; it has {', '.join(listed)}")
        self.model = listed[0]
        return self.model

    async def renderings(self) -> dict[str, str]:
        """The fingerprints by which a router's replicas render chats, by replica; {} where the server tells none."""
        try:
            url = f"{self.url}/v1/replicas"
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as answer:
                listed = json.loads(await answer.read()) if answer.status == 200 else []
            return {str(one["name"]): str(one["rendering"]) for one in listed if one.get("rendering")}
        except NO_ANSWER:
            return {}  # a server of another make

    async def hits_by_tier(self) -> Counter[str]:
        """The hits that a router's replicas, or this server, have counted, by tier; {} where they tell none."""
        urls = [self.url]
        with suppress(*NO_ANSWER):
            listed = json.loads(await self._text(f"{self.url}/v1/replicas"))
            urls = [str(one["url"]) for one in listed]
        texts = []
        for url in urls:
            with suppress(*NO_ANSWER):
                texts.append(await self._text(f"{url}/metrics"))
        return read_hits(texts)

    async def _text(self, url: str) -> str:
        """The body of an answer with status 200; "" of any other."""
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as answer:
            return await answer.text() if answer.status == 200 else ""

    async def ask(self, record: Record, api: str, body: Mapping[str, Any], began_s: float) -> None:
        """Send one request and fill `record`; every failure ends up in it, only cancellation is raised.

        began_s: the run's beginning on the clock `now`.
        """
        try:
            await asyncio.wait_for(self._ask_until_taken(record, api, body, began_s), self.timeout_s)
        except asyncio.TimeoutError:
            _fail(record, "timeout", f"no whole answer within {self.timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(record, "cannot connect", _first_line(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(record, "connection lost", _first_line(error))
        except ValueError as error:
            _fail(record, "bad answer", _first_line(error))
        record.end_s = self._now() - began_s

    async def _ask_until_taken(self, record: Record, api: str, body: Mapping[str, Any], began_s: float) -> None:
        while (wait_s := await self._ask_once(record, api, body, began_s)) is not None:
            await asyncio.sleep(wait_s)

    async def _ask_once(self, record: Record, api: str, body: Mapping[str, Any], began_s: float) -> float | None:
        """One attempt; returns the seconds to wait before the next one, None if this was the last."""
        if record.sent_s is None:
            record.sent_s = self._now() - began_s
        async with self._session.post(f"{self.url}{PATHS[api]}", json={"model": self.model, **body}) as answer:
            record.http_status = answer.status
            record.replica = answer.headers.get(REPLICA_HEADER, "")
            if answer.status == 429:
                code, detail = _read_error(await answer.text())
                record.refusals.append(code or "unnamed")
                if self.on_refusal == "retry":
                    # Up to a tenth more, so that all who were refused together do not come back together.
                    return _retry_after_s(answer.headers.get("Retry-After")) * (1 + self._draw() / 10)
                record.status, record.error, record.error_detail = REFUSED, "", detail
            elif answer.status != 200:
                _, detail = _read_error(await answer.text())
                _fail(record, f"HTTP {answer.status}", detail)
            else:
                await self._read_stream(record, answer, began_s)
        return None

    async def _read_stream(self, record: Record, answer: aiohttp.ClientResponse, began_s: float) -> None:
        finished_s: float | None = None
        pieces: list[str] = []
        async for one in read_events(answer.content.iter_any()):
            if one.data is None:
                continue
            if one.is_done:
                record.status = OK
                break
            at_s = self._now() - began_s
            event = one.as_json()
            if "error" in event:
                _fail(record, "error in the stream", _read_error(json.dumps(event))[1])
                break
            record.take(event)
            piece, finished = _read_choice(event)
            if piece:
                pieces.append(piece)
                record.piece_s.append(at_s)
            if finished:
                finished_s = at_s
        else:
            _fail(record, "cut short", f"the stream ended without [DONE] after {len(pieces)} pieces of text")
        if not record.piece_s and finished_s is not None:
            record.piece_s.append(finished_s)  # tokens without text, such as an end of text at once
        record.text = "".join(pieces)


def _read_choice(event: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of an event, and whether the answer ends with it."""
    choices = event.get("choices")
    if not choices:
        return "", False
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict):
        raise ValueError(f"choices that are no list of objects: {str(choices)[:80]}")
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return str(text or ""), bool(choice.get("finish_reason"))


def _read_error(body: str) -> tuple[str, str]:
    """Code and message of an error in OpenAI's form; ("", the body) of any other."""
    try:
        error = json.loads(body)["error"]
        if isinstance(error, str):
            return "", error[:DETAIL_CHARACTERS]
        return str(error.get("code") or error.get("type") or ""), str(error.get("message") or "")[:DETAIL_CHARACTERS]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", body.strip()[:DETAIL_CHARACTERS]


def _retry_after_s(header: str | None) -> float:
    try:
        return max(0.0, float(header or ""))
    except ValueError:  # absent, or a date, which inference servers do not send
        return DEFAULT_RETRY_S


def _fail(record: Record, error: str, detail: str) -> None:
    record.status, record.error, record.error_detail = FAILED, error, detail


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:DETAIL_CHARACTERS]
