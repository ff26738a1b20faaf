"""The ranks of an engine: one in this process, or several in processes forked from it, in one gloo group.

Importing SGLang takes most of a minute, and a fork takes nothing. A scenario is a function of its `World`; all ranks
run the same one, and what goes wrong on one of them is raised here.
"""

from __future__ import annotations

import os
import pickle
import random
import select
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.engines.sglang.linker.engine import LinkerEngine, Req, prompt

WAIT_S = 200.0
STIR_TOKENS = (40, 200)


@dataclass
class World:
    """What a rank knows. rank, size: its number, of how many. is_loaded: other requests come and go meanwhile."""

    folder: Path
    rank: int = 0
    size: int = 1
    is_loaded: bool = False
    group: Any = None
    engines: list[LinkerEngine] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(7))
    waiting: list[Req] = field(default_factory=list)

    def engine(self, extra: Mapping[str, Any], **more: Any) -> LinkerEngine:
        """An engine of this rank; closed with the world."""
        engine = LinkerEngine(extra, group=self.group, rank=self.rank, **more)
        self.engines.append(engine)
        return engine

    def stir(self, engine: LinkerEngine) -> list[Req]:
        """Other requests, where the engine is loaded: some that wait, and those that run in the next batch.

        The same on every rank, as a scheduler hands all of them the same requests.
        """
        if not self.is_loaded:
            return []
        seed = self.random.randrange(6)
        tokens = prompt(1000 + seed, 240)[: self.random.randrange(*STIR_TOKENS)]
        self.waiting.append(engine.match(tokens))
        beside = engine.admit(prompt(2000 + seed, self.random.randrange(*STIR_TOKENS)))
        return [] if beside is None else [beside]

    def run(self, engine: LinkerEngine, *reqs: Req) -> list[Req]:
        """Run a batch of these, with what else the engine has to do; returns those that failed."""
        beside = self.stir(engine)
        failed = engine.forward(*reqs, *beside)
        for req in (*reqs, *beside):
            engine.finish(req)
        return failed

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def play(scenario: Callable[[World], None], folder: Path, *, ranks: int = 1, is_loaded: bool = False) -> None:
    """Run a scenario on so many ranks. Raises what went wrong on any of them."""
    if ranks == 1:
        _play(scenario, World(folder, is_loaded=is_loaded))
        return
    pipes, children = [], []
    for rank in range(ranks):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _play_rank(scenario, folder, rank, ranks, is_loaded, writer)
        os.close(writer)
        pipes.append(reader)
        children.append(child)
    try:
        errors = [_read(pipe, time.monotonic() + WAIT_S) for pipe in pipes]
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for pipe in pipes:
            os.close(pipe)
    told = [f"rank {rank}:\n{error}" for rank, error in enumerate(errors) if error]
    assert not told, "\n".join(told)


def _play(scenario: Callable[[World], None], world: World) -> None:
    try:
        scenario(world)
        for engine in world.engines:
            if engine.cache.linker is not None:
                engine.settle()
                engine.check()
    finally:
        world.close()


def _play_rank(
    scenario: Callable[[World], None], folder: Path, rank: int, ranks: int, is_loaded: bool, writer: int
) -> None:
    """In a child: never returns."""
    error = ""
    try:
        store = dist.FileStore(str(folder / "gloo"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        _play(scenario, World(folder, rank, ranks, is_loaded, dist.group.WORLD))
        dist.barrier()
    except BaseException:
        error = traceback.format_exc()
    finally:
        os.write(writer, pickle.dumps(error[-8000:]))
        os._exit(0)


def _read(pipe: int, until: float) -> str:
    """What a rank has to say at its end."""
    told = b""
    while time.monotonic() < until:
        if select.select([pipe], [], [], 1.0)[0]:
            part = os.read(pipe, 65536)
            if not part:
                return str(pickle.loads(told)) if told else "it ended without a word"
            told += part
    return f"it has not ended within {WAIT_S:.0f} s"
