"""A llama-server, spoken to over HTTP: what it is, how it tokenizes, and the files of its slots.

Its event loop's thread only. Times are bounded: a server that hangs must not hold up those that wait for its word.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from kvstore.errors import ConfigError, KVStoreError

CALL_TIMEOUT_S = 30.0  # tokenizing, telling of itself
STATE_TIMEOUT_S = 60.0  # writing or reading a slot's file; it waits for a slot that is busy
CONNECT_TIMEOUT_S = 5.0
# llama-server hangs up after 5 s without a request; a request sent in that moment would be lost.
KEEPALIVE_S = 3.0
LEFT_S = 3600.0  # the age of a file that no front uses any more: each is used for some minutes at the most
_VOLATILE = ("is_sleeping",)  # of /props: changes in one and the same server


class ServerGone(KVStoreError):
    """llama-server cannot be reached, or hangs."""


class ServerRefused(KVStoreError):
    """llama-server has answered with an error. status: of HTTP; message: its own words."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"llama-server answers {path} with {status}: {message}")
        self.status = status
        self.message = message


class LlamaServer:
    """One server. url: its address, without a path; key: its API key, "" for none; folder: its --slot-save-path."""

    def __init__(self, url: str, folder: Path, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._name = secrets.token_hex(8)  # fronts may share the folder, in containers in which all are process 1
        self._numbers = itertools.count()
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections; opened by the first use, in the loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S),
                headers=self._headers,
                auto_decompress=True,
            )
        return self._session

    async def close(self) -> None:
        """Hang up. Idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def props(self) -> dict[str, Any]:
        """Its settings, as far as it tells. Raises ConfigError if it is no llama-server, or too old."""
        try:
            found = await self.call("GET", "/props")
        except ServerRefused as error:
            if error.status in (401, 403):
                raise ConfigError(f"{self.url} wants an API key; give it: --api-key KEY") from error
            raise ConfigError(self._no_llama(f"answers GET /props with {error.status}")) from error
        except ValueError as error:
            raise ConfigError(self._no_llama("does not answer in JSON")) from error
        if not isinstance(found, dict) or not isinstance(found.get("total_slots"), int):
            raise ConfigError(self._no_llama("tells no total_slots in GET /props"))
        return {name: value for name, value in found.items() if name not in _VOLATILE}

    async def adapters(self) -> list[dict[str, Any]]:
        """Its LoRA adapters; none where it does not know the question."""
        try:
            found = await self.call("GET", "/lora-adapters")
        except ServerRefused:
            return []
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt as a completion would have them. Raises ServerRefused."""
        body = {"content": text, "add_special": True, "parse_special": True}
        found = await self.call("POST", "/tokenize", body)
        tokens = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ServerRefused("/tokenize", 200, "it has no tokens")
        return tokens

    async def render(self, body: Mapping[str, Any]) -> str:
        """The prompt that a chat request becomes. Raises ServerRefused."""
        found = await self.call("POST", "/apply-template", body)
        prompt = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(prompt, str):
            raise ServerRefused("/apply-template", 200, "it has no prompt")
        return prompt

    def new_file(self) -> Path:
        """A name in the folder that is not taken; the caller removes the file."""
        return self.folder / f"kvstore-{self._name}-{next(self._numbers)}.bin"

    def remove_left(self) -> None:
        """Remove files that fronts left behind: those that were killed, and ours that came when nobody waited any more.

        Blocks. Call it when no file of ours is in use.
        """
        for path in self.folder.glob("kvstore-*-*.bin"):
            with suppress(OSError):
                is_ours = path.name.startswith(f"kvstore-{self._name}-")
                if is_ours or time.time() - path.stat().st_mtime > LEFT_S:
                    path.unlink()

    async def save(self, slot: int, path: Path) -> None:
        """Have the state of a slot written to `path`. Raises ServerRefused."""
        await self._slot(slot, "save", path.name)

    async def restore(self, slot: int, path: Path) -> None:
        """Have the state of a slot read from `path`; its word that it was is worth nothing. Raises ServerRefused."""
        await self._slot(slot, "restore", path.name)

    async def erase(self, slot: int) -> None:
        """Empty a slot. Raises ServerRefused."""
        await self._slot(slot, "erase", None)

    async def call(self, method: str, path: str, body: Any = None, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """One question, one answer in JSON. Raises ServerGone, ServerRefused, and ValueError for what is no JSON."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            async with self.session.request(method, self.url + path, json=body, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise ServerRefused(path, answer.status, error_text(await answer.read()))
                return await answer.json(content_type=None)
        except asyncio.TimeoutError:
            raise ServerGone(f"llama-server at {self.url} does not answer {path} within {timeout_s:.0f} s") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise ServerGone(f"llama-server at {self.url} cannot be reached ({type(error).__name__})") from None
        except aiohttp.ClientError as error:
            raise ValueError(f"no answer of HTTP: {type(error).__name__}") from None

    async def _slot(self, slot: int, action: str, name: str | None) -> None:
        body = {} if name is None else {"filename": name}
        await self.call("POST", f"/slots/{slot}?action={action}", body, STATE_TIMEOUT_S)

    def _no_llama(self, why: str) -> str:
        return (
            f"{self.url} {why}, so it is no llama-server, or one older than can be used here; give the address of a "
            "llama-server of this year: --url http://HOST:PORT"
        )


def error_text(raw: bytes) -> str:
    """The words of llama-server's error, at most 300 characters."""
    try:
        found = json.loads(raw)
        error = found["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        text = raw.decode(errors="replace")
    return str(text)[:300]
