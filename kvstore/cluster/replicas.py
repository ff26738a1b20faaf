"""The replicas a router knows: who is there, who has gone, who is back.

A replica is asked for `/readyz` all the time. One that refuses the connection or says 503 gets no further requests
until it says 200; one that does not answer several times in a row is taken for lost, and the requests it still has are
tried elsewhere. The router's event loop only.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from kvstore.config.secret import mask_url
from kvstore.errors import ConfigError
from kvstore.logs import mask

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 2.0
# A replica computes on the cores its event loop needs too, so a late answer alone says little.
SILENCES_TO_LOSE = 4
NOT_THERE = (aiohttp.ClientError, OSError)


class ReplicaLink:
    """One replica as the router sees it.

    name:    as it calls itself; its URL until it has said. shown: the URL without a password.
    lost:    done once it is taken for lost; a new one when it is back.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.shown = self.name = mask_url(url)
        self.is_ready = False
        self.in_flight = 0
        self.num_requests = 0
        self.num_failures = 0
        self.num_refusals = 0
        self.num_silent_lookups = 0
        self.hit_tokens = 0
        self.silences = 0
        self.rendering = ""  # the fingerprint of how it makes prompts; "" until it has said
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def up(self, name: str, rendering: str = "") -> None:
        """It is ready."""
        if not self.is_ready:
            log.info("replica %s (%s) is ready", name, self.shown)
        if self.lost.done():
            self.lost = asyncio.get_running_loop().create_future()
        self.name, self.is_ready, self.silences, self.rendering = name, True, 0, rendering

    def down(self, why: str) -> None:
        """Send it nothing until it is ready again. Requests it has go on."""
        if self.is_ready:
            log.warning("replica %s (%s) is not ready: %s", self.name, self.shown, why)
        self.is_ready = False

    def silent(self) -> None:
        """It did not answer in time."""
        self.silences += 1
        if self.silences >= SILENCES_TO_LOSE:
            self.down(f"no answer, {self.silences} times in a row")
            if not self.lost.done():
                self.lost.set_result(None)

    def as_json(self) -> dict[str, Any]:
        """One entry of `GET /v1/replicas`."""
        return {
            "name": self.name,
            "url": self.shown,
            "ready": self.is_ready,
            "in_flight": self.in_flight,
            "requests": self.num_requests,
            "failures": self.num_failures,
            "refusals": self.num_refusals,
            "silent_lookups": self.num_silent_lookups,
            "hit_tokens": self.hit_tokens,
            "rendering": self.rendering,
        }


class Replicas:
    """All of them, and the task that asks how they are."""

    def __init__(self, urls: Sequence[str], interval_s: float) -> None:
        self.links = [ReplicaLink(url) for url in urls]
        self._interval_s = interval_s
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._told: set[str] = set()

    @property
    def session(self) -> aiohttp.ClientSession:
        """For requests to replicas. After `start`."""
        assert self._session is not None
        return self._session

    @property
    def ready(self) -> list[ReplicaLink]:
        """Those that take requests, in the order they were given."""
        return [link for link in self.links if link.is_ready]

    @property
    def renderings(self) -> set[str]:
        """The fingerprints of those that are ready. More than one: they make different prompts of a conversation."""
        return {link.rendering for link in self.ready if link.rendering}

    async def start(self) -> None:
        """Ask everybody once, then again and again."""
        # No limit: what is too much is for the replicas to say. No time limit either: an answer may take minutes, and
        # a replica that hangs is found by its silence. A connection for each request: a kept one may have been closed
        # by a replica that was restarted, and would look like a death.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        )
        await asyncio.gather(*(self._ask(link) for link in self.links))
        self._tasks = [asyncio.create_task(self._watch(link)) for link in self.links]

    async def close(self) -> None:
        """Stop asking, hang up. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _watch(self, link: ReplicaLink) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._ask(link)

    async def _ask(self, link: ReplicaLink) -> None:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self.session.get(f"{link.url}/readyz", timeout=timeout) as answer:
                body = await answer.read()
        except asyncio.TimeoutError:
            link.silent()
        except NOT_THERE as error:
            link.silences = 0
            link.down(mask(str(error)) or type(error).__name__)
        else:
            link.silences = 0
            if answer.status == 200:
                link.up(_said(body, "name") or link.shown, _said(body, "rendering"))
                self._check_renderings()
            else:
                link.down(f"it answers {answer.status}")

    def _check_renderings(self) -> None:
        """Warn, once for each set of them, of replicas that render differently."""
        found = self.renderings
        if len(found) > 1 and found != self._told:
            told = ", ".join(f"{link.name} {link.rendering}" for link in self.ready)
            log.warning("replicas render chats differently, so that they cannot use each other's pages: %s", told)
        self._told = found


def check_urls(urls: Sequence[str]) -> list[str]:
    """The base URLs, without a slash at the end. Raises ConfigError."""
    if not urls:
        raise ConfigError("--replica is missing; give it once for each replica, e.g. --replica http://127.0.0.1:8001")
    checked = [url.rstrip("/").removesuffix("/v1") for url in urls]
    for url in checked:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path:
            raise ConfigError(f"--replica is {mask_url(url)!r}; it must be http://host:port")
    if len(set(checked)) < len(checked):
        raise ConfigError("--replica: the same URL is given twice")
    return checked


def _said(body: bytes, field: str) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    return str(answer.get(field, ""))[:64] if isinstance(answer, dict) else ""
