"""What a daemon can know of its configuration before the first client comes, and what `/readyz` answers with.

The sizes of pages come with a client, so its store is opened then. But a disk path that is no directory, memory that
the machine does not have or a Redis that nobody reaches can be seen at the start. What can never work stops it; what
may come to work (a server that is not up yet) is told, and asked again.

The daemon's event loop only; servers are asked in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path

from kvstore import logs
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, KVStoreError
from kvstore.ownership import owner_problem
from kvstore.tiers.memory_limit import available_memory
from kvstore.tiers.redis.info import ServerInfo, ask_server
from kvstore.units import format_bytes

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # as the slab leaves to everybody else
ASK_AGAIN_S = 2.0
LOOK_AGAIN_S = 2.0  # at disk and memory, for /readyz


class Preflight:
    """Looks at what a configuration names.

    redis: what the server said of itself; None as long as it was not reached. redis_problem: why not.
    """

    def __init__(self, config: Config) -> None:
        self.redis: ServerInfo | None = None
        self.redis_problem = ""
        self._config = config
        self._task: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")
        self._seen: list[str] = []

    def check(self) -> None:
        """Raise ConfigError for what no client's store could be opened with."""
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))

    def problems(self) -> list[str]:
        """What no store can be opened with now: its memory, and the directory of its disk tier."""
        return [problem for problem in (self._memory_problem(), self._disk_problem()) if problem]

    def recent_problems(self) -> list[str]:
        """The same, seen a moment ago at most: for whoever asks often."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_AGAIN_S:
            self._looked_at, self._seen = now, self.problems()
        return self._seen

    async def start(self) -> None:
        """Ask Redis, if there is one; if it is not reached, ask again until it is."""
        if self._config.redis.url is None:
            return
        await self._ask()
        if self.redis is None:
            log.warning("redis.url %s is not reached, and asked again: %s", self._config.redis.url, self.redis_problem)
            self._task = asyncio.get_running_loop().create_task(self._ask_until_reached())
        elif self.redis.evicts is False:
            log.warning(
                "redis.url %s has maxmemory-policy %s: when it is full it takes no more pages; set it to allkeys-lru, "
                "or bound what is kept there with redis.capacity_bytes",
                self._config.redis.url,
                self.redis.policy,
            )

    async def close(self) -> None:
        """Ask no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # ---- private ------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        redis = self._config.redis
        assert redis.url is not None
        try:
            timeout_s = max(redis.connect_timeout_s, redis.timeout_s)
            self.redis = await asyncio.to_thread(ask_server, redis.url.reveal(), timeout_s=timeout_s)
            self.redis_problem = ""
        except (KVStoreError, OSError, ValueError) as error:
            self.redis_problem = logs.mask(str(error))[:200]

    async def _ask_until_reached(self) -> None:
        while self.redis is None:
            await asyncio.sleep(ASK_AGAIN_S)
            await self._ask()
        log.warning("redis.url %s is reached", self._config.redis.url)

    def _memory_problem(self) -> str:
        wanted = self._config.host.capacity_bytes // self._config.service.max_namespaces
        available = available_memory() - SPARE_BYTES
        if wanted <= available:
            return ""
        fitting = max(0, available) * self._config.service.max_namespaces
        return (
            f"host.capacity_bytes is {format_bytes(self._config.host.capacity_bytes)}, but only "
            f"{format_bytes(max(0, available))} of memory are available: set it to at most {fitting >> 20}MiB"
        )

    def _disk_problem(self) -> str:
        path = self._config.disk.path
        if path is None:
            return ""
        name = f"disk.path is {path}"
        existing = _nearest(Path(path).absolute())
        if not existing.is_dir():
            where = "it" if existing == Path(path).absolute() else str(existing)
            return f"{name}; {where} is no directory: name one, it is made if absent"
        if not os.access(existing, os.W_OK | os.X_OK):
            return f"{name}; user {os.geteuid()} cannot write in {existing}: run chown {os.geteuid()} {existing}"
        if existing == Path(path).absolute():
            with contextlib.suppress(OSError):
                problem = owner_problem(existing.stat())
                if problem:
                    return f"{name}; it {problem}: run chown -R {os.geteuid()} {existing}"
        return ""


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it that can be seen."""
    return next((one for one in (path, *path.parents) if os.path.lexists(one)), Path("/"))
