"""The check of a daemon's configuration before the first client comes; `/readyz` answers with it.

The sizes of pages come with a client, so its store is opened then. But a disk path that is no directory, memory that
the machine does not have or a server that nobody reaches can be seen at the start. What can never work stops it; what
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
from typing import Any

from kvstore import logs
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, KVStoreError
from kvstore.ownership import owner_problem
from kvstore.tiers.kind import Asked, TierKind
from kvstore.tiers.memory_limit import available_memory
from kvstore.units import format_bytes

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # as the slab leaves to everybody else
ASK_AGAIN_S = 2.0
LOOK_AGAIN_S = 2.0  # at disk and memory, for /readyz


class Preflight:
    """Looks at what a configuration names.

    asked:     what servers of tiers said of themselves, by tier; those that were not reached are not there.
    unreached: why not, by tier.
    """

    def __init__(self, config: Config) -> None:
        self.asked: dict[str, Asked] = {}
        self.unreached: dict[str, str] = {}
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []
        self._looked_at = float("-inf")
        self._seen: list[str] = []

    def check(self) -> None:
        """Raise ConfigError for what no client's store could be opened with."""
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))

    def problems(self) -> list[str]:
        """The reason for which no store can be opened now: its memory, or the directories of its tiers."""
        directories = [self._directory_problem(kind, section) for kind, section in self._config.tiers()]
        return [problem for problem in (self._memory_problem(), *directories) if problem]

    def recent_problems(self) -> list[str]:
        """The same, seen a moment ago at most: for whoever asks often."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_AGAIN_S:
            self._looked_at, self._seen = now, self.problems()
        return self._seen

    async def start(self) -> None:
        """Ask the servers that tiers are on; one that is not reached is asked again until it is."""
        for kind, section in self._config.tiers():
            if kind.ask is None:
                continue
            await self._ask(kind, section)
            if kind.name in self.unreached:
                log.warning("%s is not reached, and asked again: %s", _named(kind, section), self.unreached[kind.name])
                self._tasks.append(asyncio.get_running_loop().create_task(self._ask_until_reached(kind, section)))
            elif self.asked[kind.name].warning:
                log.warning("%s", self.asked[kind.name].warning)

    async def close(self) -> None:
        """Ask no more. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    # ---- private ------------------------------------------------------------------------------------------------

    async def _ask(self, kind: TierKind[Any], section: Any) -> None:
        assert kind.ask is not None
        try:
            self.asked[kind.name] = await asyncio.to_thread(kind.ask, section)
            self.unreached.pop(kind.name, None)
        except (KVStoreError, OSError, ValueError) as error:
            self.unreached[kind.name] = logs.mask(str(error))[:200]

    async def _ask_until_reached(self, kind: TierKind[Any], section: Any) -> None:
        while kind.name in self.unreached:
            await asyncio.sleep(ASK_AGAIN_S)
            await self._ask(kind, section)
        log.warning("%s is reached", _named(kind, section))

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

    def _directory_problem(self, kind: TierKind[Any], section: Any) -> str:
        path = kind.home(section)
        if path is None:
            return ""
        name = f"{kind.name}.{kind.directory} is {path}"
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


def _named(kind: TierKind[Any], section: Any) -> str:
    return f"{kind.name}.{kind.switch} {getattr(section, kind.switch)}"


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it that can be seen."""
    return next((one for one in (path, *path.parents) if os.path.lexists(one)), Path("/"))
