"""One engine of the TTFT bench, in a process of its own, which measures when its turn comes.

    host, disk, redis   our connector, that tier the only one that has the pages when they are loaded
    fs                  vLLM's own offloading with its own `fs` tier, its code unchanged, through our CpuTieringSpec
    tier                the same offloading with our KVStoreTier on the same disk

A turn is one prompt length once: rows are sent as they are measured.

    cold       vLLM alone: the connector is unplugged from scheduler and worker, as if none had been configured
    save       the same with the connector and a prompt nobody has: what saving costs where nothing can be reused
    load       from the tier; vLLM's own cache and host memory were emptied, the files' page cache was dropped
    load_warm  from the tier, the files having been read just before (fs and tier)
    own_cache  the same prompt right after, from vLLM's own prefix cache, the connector unplugged
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvstore.plan.state import PageState
from tests.engines.vllm.engine import Engine, make_prompt
from tests.engines.vllm.tier_engine import TierEngine

MiB = 1 << 20
TAIL = 5  # tokens after the last whole block: what is computed when everything else is there
HOST_BYTES = 640 * MiB  # two prompts of 8192 tokens and some
DISK_BYTES = 2048 * MiB
PATIENT = {"lookup_deadline_s": 30, "load_deadline_s": 60}  # what is measured is speed, not giving up
PAIRED = ("host", "disk")  # engines that measure `cold` beside `save`


@dataclass(frozen=True)
class EngineSettings:
    """What one engine process is told."""

    kind: str
    model: str
    block: int
    max_length: int
    hits: int  # loads, and hits of vLLM's own cache, per turn
    folder: str
    redis_url: str


def serve(pipe: Connection, settings: EngineSettings) -> None:
    """Measure the turns asked for until the other end closes. The process's main function."""
    bench = (TierBench if settings.kind in ("fs", "tier") else ConnectorBench)(settings)
    pipe.send({"ready": settings.kind, "facts": bench.facts()})
    try:
        while True:
            length, rep = pipe.recv()
            for row in bench.turn(length, rep):
                pipe.send(row)
            pipe.send(None)
    except (EOFError, BrokenPipeError):
        bench.engine.close()


class Bench:
    """An engine and its rows. Subclasses make the engine and know how to empty what is above the tier."""

    engine: Any

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.folder) / settings.kind
        self.folder.mkdir(parents=True, exist_ok=True)
        blocks = -(-(settings.max_length + TAIL) // settings.block)
        self.options = {
            "block_size": settings.block,
            "max_model_len": settings.max_length + 256,
            "max_num_seqs": 2,
            "num_gpu_blocks_override": 2 * blocks + 16,
        }
        self.engine = self.open()
        self.engine.ask(make_prompt(300, 7), 2)
        self.engine.settle()

    def turn(self, length: int, rep: int) -> Iterator[dict[str, Any]]:
        """Measure every row of one length; the order of `cold` and `save` changes from turn to turn."""
        seed = 1000 * length + 2 * rep
        prompt = make_prompt(length + TAIL, seed)
        rows = ["cold", "save"] if rep % 2 else ["save", "cold"]
        for row in rows:
            if row == "save":
                yield self.saved(prompt, row)
            elif self.settings.kind in PAIRED:
                yield self.cold(make_prompt(length + TAIL, seed + 1))
        for _ in range(self.settings.hits):
            self.forget()
            drop_page_cache(self.folder)
            yield self.hit(prompt, "load")
            yield self.own_cache(prompt)
        if self.settings.kind in ("fs", "tier"):
            self.forget()
            read_files(self.folder)
            yield self.hit(prompt, "load_warm")

    def cold(self, prompt: Sequence[int]) -> dict[str, Any]:
        """vLLM alone, nothing cached."""
        self.forget()
        with unplugged(self.engine):
            row = self.ask(prompt, "cold")
            assert self.engine.llm.reset_prefix_cache()
        assert row["cached"] == 0
        return row

    def saved(self, prompt: Sequence[int], name: str) -> dict[str, Any]:
        """Computed and saved; `all_cpu_s` counts until everything is written behind."""
        self.forget()
        cpu = time.process_time()
        row = self.ask(prompt, name)
        self.engine.settle()
        row["all_cpu_s"] = time.process_time() - cpu
        assert row["cached"] == 0
        return row

    def hit(self, prompt: Sequence[int], name: str) -> dict[str, Any]:
        """Loaded."""
        row = self.ask(prompt, name)
        self.engine.settle()
        block = self.settings.block
        assert row["cached"] == len(prompt) // block * block, f"{name}: only {row['cached']} tokens came from the tier"
        return row

    def own_cache(self, prompt: Sequence[int]) -> dict[str, Any]:
        """vLLM alone, everything in its own cache."""
        with unplugged(self.engine):
            return self.ask(prompt, "own_cache")

    def ask(self, prompt: Sequence[int], name: str) -> dict[str, Any]:
        """One token: the call takes about its TTFT."""
        hooks_s, steps = self.hooks()
        answer = self.engine.ask(prompt, 1)
        hooks_after_s, steps_after = self.hooks()
        return {
            "row": name,
            "wall_s": answer["wall_s"],
            "cpu_s": answer["cpu_s"],
            "all_cpu_s": answer["cpu_s"],
            "cached": answer["cached"],
            "hooks_s": hooks_after_s - hooks_s,
            "steps": steps_after - steps,
        }

    def open(self) -> Any:
        """Make the engine."""
        raise NotImplementedError

    def forget(self) -> None:
        """Empty everything above the tier that is measured."""
        raise NotImplementedError

    def hooks(self) -> tuple[float, int]:
        """Seconds spent in the scheduler's hooks of ours so far, and in how many steps."""
        return 0.0, 0

    def facts(self) -> dict[str, Any]:
        """What a reader of the figures should know of this engine."""
        return {}


class ConnectorBench(Bench):
    """Our connector."""

    def open(self) -> Engine:
        sections: dict[str, Any] = {
            "disk": {"disk": {"path": str(self.folder), "capacity_bytes": DISK_BYTES, "shared": False}},
            "redis": {"redis": {"url": self.settings.redis_url, "timeout_s": 30}},
        }
        extra = {
            "host": {"capacity_bytes": HOST_BYTES},
            "store": {**PATIENT, "load_or_recompute": False},
            **sections.get(self.settings.kind, {}),
        }
        return Engine(self.settings.model, extra, **self.options)

    def forget(self) -> None:
        self.engine.forget_own_cache()
        if self.settings.kind == "host":
            return
        store = self.engine.half.store
        with store._lock:
            for page in [page for page in store._planner.books.catalog.pages() if page.state == PageState.READY]:
                store._planner.books.host.drop((page,))

    def hooks(self) -> tuple[float, int]:
        connector = self.engine.scheduler.connector
        if connector is None:
            return 0.0, 0
        return connector._hook_seconds - self.engine.half.counters["rest_seconds"], connector._steps

    def facts(self) -> dict[str, Any]:
        if self.settings.kind != "disk":
            return {}
        return {"direct_io": self.engine.half.store._dispatcher.lanes["disk"].tier.is_direct}


class TierBench(Bench):
    """vLLM's own offloading with a secondary tier."""

    def open(self) -> TierEngine:
        entries: dict[str, dict[str, Any]] = {
            "fs": {"type": "fs", "root_dir": str(self.folder)},
            "tier": {"disk": {"path": str(self.folder), "capacity_bytes": DISK_BYTES, "shared": False}},
        }
        entry = entries[self.settings.kind]
        if self.settings.kind == "tier":
            entry["store"] = PATIENT
        return TierEngine(self.settings.model, entry, {"cpu_bytes_to_use": HOST_BYTES}, **self.options)

    def forget(self) -> None:
        self.engine.forget()

    def facts(self) -> dict[str, Any]:
        tier = self.engine.tier
        direct = tier._use_o_direct if self.settings.kind == "fs" else tier.core.mover.tier("disk").is_direct
        return {"direct_io": direct}


@contextmanager
def unplugged(engine: Engine) -> Iterator[None]:
    """The engine at rest without its connector, in the scheduler and in the worker."""
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    scheduler = engine.scheduler
    connector, scheduler.connector = scheduler.connector, None
    agent, state._KV_CONNECTOR_AGENT = state._KV_CONNECTOR_AGENT, None
    try:
        yield
    finally:
        scheduler.connector, state._KV_CONNECTOR_AGENT = connector, agent


def drop_page_cache(folder: Path) -> None:
    """Ask the kernel to forget what it caches of the files below `folder`."""
    for path in files_below(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_files(folder: Path) -> None:
    """Read the files below `folder` once, so that the kernel caches them."""
    for path in files_below(folder):
        with path.open("rb") as file:
            while file.read(4 * MiB):
                pass


def files_below(folder: Path) -> list[Path]:
    """All of them."""
    return [path for path in folder.rglob("*") if path.is_file()]
