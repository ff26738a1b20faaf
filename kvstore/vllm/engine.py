"""A vLLM server, spoken to over HTTP: how it tokenizes, what it serves and counts. Its event loop's thread only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from kvstore.errors import ConfigError, KVStoreError
from kvstore.vllm.counters import EngineCounters, read_counters
from kvstore.vllm.requests import texts_or_ids

CALL_TIMEOUT_S = 30.0
LOOK_TIMEOUT_S = 10.0  # its API has a process of its own, which answers while others compute
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 3.0  # vLLM hangs up after 5 s without a request; a request sent in that moment would be lost

CONVERSATION = ("model", "messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt")


class EngineGone(KVStoreError):
    """vLLM cannot be reached, or hangs."""


class EngineSilent(EngineGone):
    """vLLM has not answered in time."""


class VllmEngine:
    """One server. url: its address, without a path; key: its API key, "" for none."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.max_tokens = 0  # of a prompt with its answer; after `identify`
        self.models: tuple[str, ...] = ()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self._answers: set[aiohttp.ClientResponse] = set()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections; opened by the first use, in the loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
                headers=self._headers,
            )
        return self._session

    async def close(self) -> None:
        """Hang up: what is under way ends as if vLLM had. Idempotent; the next use connects again."""
        for answer in self._answers:
            # Closing a connection does not wake one that reads from it.
            answer.content.set_exception(aiohttp.ClientPayloadError("hung up"))
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def generate(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Its answer to a request, which may take for ever: from the first byte on. Raises what aiohttp does."""
        async with self.session.post(self.url + path, json=body) as answer:
            self._answers.add(answer)
            try:
                yield answer
            finally:
                self._answers.discard(answer)

    async def identify(self) -> None:
        """Ask what it serves. Raises ConfigError if it is no vLLM server, EngineGone if it cannot be reached."""
        status, raw = await self._call("GET", "/v1/models")
        if status in (401, 403):
            raise ConfigError(f"{self.url} wants an API key; give it: --api-key KEY")
        try:
            listed = json.loads(raw)["data"]
            self.models = tuple(str(one["id"]) for one in listed)
            self.max_tokens = int(listed[0]["max_model_len"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise ConfigError(
                f"{self.url} tells no max_model_len at /v1/models (HTTP {status}), so it is no vLLM server; give the "
                "address of one: --url http://HOST:PORT"
            ) from None

    async def is_well(self) -> bool:
        """Whether it says that it is. Raises EngineGone."""
        status, _ = await self._call("GET", "/health", timeout_s=LOOK_TIMEOUT_S)
        return status == 200

    async def tokenize(self, body: Mapping[str, Any], *, is_chat: bool) -> list[int] | None:
        """The tokens of a request's prompt; None where vLLM has to say itself what is wrong with it.

        Several prompts count as one: as much of them has to be computed. Raises EngineGone.
        """
        if is_chat:
            return await self._tokens({name: body[name] for name in CONVERSATION if name in body})
        prompts = texts_or_ids(body)
        if all(isinstance(one, str) for one in prompts):
            asked = {name: body[name] for name in ("model", "add_special_tokens") if name in body}
            return await self._tokens({**asked, "prompt": "\n".join(prompts)})
        ids = [token for one in prompts if isinstance(one, list) for token in one]
        return ids if all(type(token) is int for token in ids) else None

    async def counters(self) -> tuple[EngineCounters, str] | None:
        """What it has counted, and the text that says so; None where it does not say. Raises EngineGone."""
        status, raw = await self._call("GET", "/metrics", timeout_s=LOOK_TIMEOUT_S)
        text = raw.decode(errors="replace")
        try:
            return (read_counters(text), text) if status == 200 else None
        except ValueError:
            return None

    async def _tokens(self, asked: Mapping[str, Any]) -> list[int] | None:
        status, raw = await self._call("POST", "/tokenize", asked)
        try:
            tokens = json.loads(raw)["tokens"] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, list) else None

    async def _call(
        self, method: str, path: str, body: Any = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            async with self.session.request(method, self.url + path, json=body, timeout=timeout) as answer:
                return answer.status, await answer.read()
        except asyncio.TimeoutError:
            raise EngineSilent(f"vLLM at {self.url} does not answer {path} within {timeout_s:.0f} s") from None
        except aiohttp.ClientError as error:
            raise EngineGone(f"vLLM at {self.url} cannot be reached ({type(error).__name__})") from None
