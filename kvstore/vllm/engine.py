"""A vLLM server, spoken to over HTTP: how it tokenizes, what it serves and counts. Its event loop's thread only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from kvstore.errors import ConfigError, KVStoreError
from kvstore.vllm.counters import EngineCounters, read_counters

CALL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 3.0  # vLLM hangs up after 5 s without a request; a request sent in that moment would be lost


class EngineGone(KVStoreError):
    """vLLM cannot be reached, or hangs."""


class VllmEngine:
    """One server. url: its address, without a path; key: its API key, "" for none."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.max_tokens = 0  # of a prompt with its answer; after `identify`
        self.models: tuple[str, ...] = ()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

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
        """Hang up. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

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
        """Whether it says that it is."""
        status, _ = await self._call("GET", "/health")
        return status == 200

    async def tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """The tokens of a request's prompt; None where vLLM has to say itself what is wrong with it."""
        if "messages" in body:
            kept: tuple[str, ...] = (
                "model",
                "messages",
                "tools",
                "chat_template",
                "chat_template_kwargs",
                "add_generation_prompt",
            )
        else:
            prompt = body.get("prompt")
            if isinstance(prompt, list):
                return _ids(prompt)
            kept = ("model", "prompt", "add_special_tokens")
        status, raw = await self._call("POST", "/tokenize", {name: body[name] for name in kept if name in body})
        try:
            tokens = json.loads(raw)["tokens"] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, list) else None

    async def counters(self) -> tuple[EngineCounters, str]:
        """What it has counted, and the text that says so. Raises EngineGone."""
        _, raw = await self._call("GET", "/metrics")
        text = raw.decode(errors="replace")
        try:
            return read_counters(text), text
        except ValueError:
            return EngineCounters(), ""

    async def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        try:
            async with self.session.request(method, self.url + path, json=body, timeout=timeout) as answer:
                return answer.status, await answer.read()
        except asyncio.TimeoutError:
            raise EngineGone(f"vLLM at {self.url} does not answer {path} within {CALL_TIMEOUT_S:.0f} s") from None
        except aiohttp.ClientError as error:
            raise EngineGone(f"vLLM at {self.url} cannot be reached ({type(error).__name__})") from None


def _ids(prompt: list[Any]) -> list[int] | None:
    """The tokens of a prompt of ids; several prompts count as one, for they are computed as many."""
    if all(type(one) is int for one in prompt):
        return prompt
    if all(isinstance(one, list) and all(type(token) is int for token in one) for one in prompt):
        return [token for one in prompt for token in one]
    return None
