"""One command's worth of load: warm-up, the run, the run without the cache, and what is told of them.

Ctrl-C ends the run under way and keeps what it has; a second one ends the program.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kvstore.load.arrivals import Arrivals, Closed, Open
from kvstore.load.client import Client
from kvstore.load.compare import Comparison, compare
from kvstore.load.counters import gained
from kvstore.load.player import Asking, PlayedWorkload, play
from kvstore.load.progress import Progress
from kvstore.load.requests import Workload
from kvstore.load.summary import Summary, summarize
from kvstore.load.tables import comparison_report, report
from kvstore.load.workloads import warm_up

WARM_UP_CONCURRENCY = 2  # in an open loop, whose rate says nothing of how many are served at once

SETTLE_S = 1.5  # a front looks at its engine once a second
SETTLE_LOOKS = 4

WITH, WITHOUT = "with the cache", "without the cache"


@dataclass
class HttpSession:
    """A workload that is played, and its results.

    baseline:  whether to play it without the cache too; on `other` if that is given, else on `server` with its cache
               asked to keep out.
    """

    workload: Workload
    arrivals: Arrivals
    asking: Asking
    server: Client
    other: Client | None = None
    baseline: bool = False
    warmup: int = 0
    runs: list[tuple[PlayedWorkload, Summary]] = field(default_factory=list)
    comparison: Comparison | None = None
    renderings: Mapping[str, str] = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)  # hits by tier, by run

    def play(self, progress: Console) -> None:
        """Play everything, or until Ctrl-C. Raises KVStoreError if a server cannot be asked at all."""
        asyncio.run(self._play(progress))

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return any(run.interrupted for run, _ in self.runs)

    @property
    def succeeded(self) -> bool:
        """Whether every request was answered, or refused as it may be, and every text is the same."""
        bad = any(summary.failed or summary.skipped or not summary.answered for _, summary in self.runs)
        return not bad and not (self.comparison and self.comparison.differences)

    def print(self, printer: Console) -> None:
        """Print the tables."""
        for place, (_, summary) in enumerate(self.runs):
            # The comparison has what matters of the second run; all of it is in the JSON.
            printer.print(report(summary, brief=place > 0))
            if told := self.counted.get(summary.name):
                tiers = ", ".join(f"{tier} {tokens:,}" for tier, tokens in told.items())
                printer.print(f"hits by tier, as the servers counted: {tiers}\n", highlight=False)
        if self.comparison is not None:
            printer.print(comparison_report(self.comparison))

    def write_json(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write all numbers, each request's too; `about` tells of the machine that asked."""
        content = {
            "workload": {"name": self.workload.name, "seed": self.workload.seed, **self.workload.parameters},
            "arrivals": str(self.arrivals),
            "server": {"url": self.server.url, "model": self.server.model, "renderings": dict(self.renderings)},
            "load_generator": dict(about),
            "runs": [
                {
                    **summary.to_json(),
                    "counted_hit_tokens": self.counted.get(summary.name),
                    "records": [record.to_json() for record in run.records],
                }
                for run, summary in self.runs
            ],
            "comparison": self.comparison.to_json() if self.comparison else None,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def draw(self, path: Path) -> None:
        """Draw the picture; needs matplotlib."""
        from kvstore.load.plot import draw

        subtitle = f"{self._parameters()}\n{self.arrivals}; model {self.server.model}"
        draw(self.runs, self.comparison, self._title(), subtitle, path)

    @property
    def what(self) -> str:
        """Workload, parameters and arrivals in one line."""
        return f"{self.workload.name} ({self._parameters()}); {self.arrivals}"

    async def _play(self, progress: Console) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            stop.set()
            loop.remove_signal_handler(signal.SIGINT)

        with suppress(NotImplementedError, ValueError):  # Windows; a thread that is not the main one
            loop.add_signal_handler(signal.SIGINT, interrupt)
        async with self.server:
            model = await self.server.choose_model()
            progress.print(f"{self.what}\n{self.server.url}, model {model}", markup=False, soft_wrap=True)
            self.renderings = await self.server.renderings()
            if len(set(self.renderings.values())) > 1:
                told = ", ".join(f"{name} {rendering}" for name, rendering in self.renderings.items())
                progress.print(
                    f"warning: replicas render chats differently, so they cannot use each other's pages: {told}",
                    markup=False,
                    soft_wrap=True,
                )
            name = WITH if self.baseline else self.workload.name
            await self._run(name, self.server, self.asking, stop, progress)
            if self.baseline and self.other is None and not stop.is_set():
                await self._run(WITHOUT, self.server, replace(self.asking, cache=False), stop, progress)
        if self.baseline and self.other is not None and not stop.is_set():
            async with self.other:
                await self.other.choose_model()
                await self._run(WITHOUT, self.other, self.asking, stop, progress)
        if len(self.runs) == 2:
            (cache, with_cache), (baseline, without) = self.runs
            self.comparison = compare(cache, baseline, with_cache, without, same_server=self.other is None)

    async def _run(self, name: str, client: Client, asking: Asking, stop: asyncio.Event, console: Console) -> None:
        clock = time.perf_counter
        warming = warm_up(self.warmup, self.workload.seed)
        at_once = self.arrivals if isinstance(self.arrivals, Closed) else Closed(WARM_UP_CONCURRENCY)
        await play("warm-up", warming, client, at_once, asking, now=clock, stop=stop)
        before = await client.hits_by_tier()
        with Progress(name, len(self.workload.requests), console, clock) as progress:
            run = await play(
                name,
                self.workload,
                client,
                self.arrivals,
                asking,
                now=clock,
                stop=stop,
                answers=self.runs[0][0].answers if self.runs else None,
                on_record=progress.add,
            )
        self.runs.append((run, summarize(run, isinstance(self.arrivals, Open))))
        if any(record.cached_tokens for record in run.records) and all(r.hit_tokens is None for r in run.records):
            self.counted[name] = gained(before, await self._settled(client))

    @staticmethod
    async def _settled(client: Client) -> dict[str, int]:
        """What servers count once they have come to rest: some tell what they counted a second later."""
        last = await client.hits_by_tier()
        for _ in range(SETTLE_LOOKS):
            await asyncio.sleep(SETTLE_S)
            now = await client.hits_by_tier()
            if now == last:
                break
            last = now
        return dict(last)

    def _parameters(self) -> str:
        told = {**self.workload.parameters, "seed": self.workload.seed}
        return ", ".join(f"{name} {value}" for name, value in told.items() if name != "path")

    def _title(self) -> str:
        hits = self.runs[0][1].all.hit_rate
        title = f"{self.workload.name}: " + ("hits not told" if hits is None else f"{hits:.0%} of prompt tokens hit")
        line = next((line for line in self.comparison.lines if line.gain), None) if self.comparison else None
        return title + (f", median TTFT {line.gain:.1f}x as short" if line else "")
