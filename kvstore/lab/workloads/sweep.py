"""Sweeps: block references a second of the compiled engine, by policy, over libCacheSim's LRU on the same references.

The trace is made up: conversations that grow by turns below shared system prompts, in a store that has room for a tenth
of their blocks. Where libcachesim is not installed (`pip install libcachesim==0.3.5`), an OrderedDict that is an LRU
of blocks is the ceiling, and the table says so.
"""

from __future__ import annotations

import random
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.errors import ConfigError
from kvstore.lab import compiled
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.compiled import TraceArrays
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

NUM_REQUESTS = 20_000
QUICK_REQUESTS = 2_000
NUM_SYSTEMS = 20
SYSTEM_BLOCKS = 16
MOST_BLOCKS = 200
BLOCK_TOKENS = 16
SHARE = 0.1
# What libCacheSim calls an oracleGeneral trace: time, object, size, when it comes next.
RECORD = np.dtype([("time", "<u4"), ("block", "<u8"), ("size", "<u4"), ("next", "<i8")])


def run(argument: str, quick: bool) -> list[Table]:
    """Measure every policy that the engine knows, and the optimum. Raises ConfigError where it is not built."""
    if not compiled.is_built:
        raise ConfigError("the engine of sweeps is not built here; install the package where a C compiler is")
    arrays = TraceArrays.of(_conversations(QUICK_REQUESTS if quick else NUM_REQUESTS))
    num_blocks, num_references = int(arrays.num_blocks * SHARE), len(arrays.ids)
    arrays.next_uses()
    with tempfile.TemporaryDirectory() as folder:
        ceiling = _libcachesim(arrays, num_blocks, Path(folder)) or _ordered_dict(arrays, num_blocks)
        cases = [Case(*ceiling, num_references)]
        cases += [
            Case(policy, _playing(arrays, Setup(((HOST, num_blocks),), policy)), num_references)
            for policy in compiled.policies()
        ]
        cases.append(Case("the optimum", lambda: compiled.optimum(arrays, num_blocks), num_references))
        name = f"{num_references:,} references to {arrays.num_blocks:,} blocks, room for {num_blocks:,}"
        return [measure(name, "references", cases, quick=quick)]


def _conversations(num_requests: int) -> ReplayTrace:
    rng = random.Random(0)
    fresh = iter(range(1 << 40))
    systems = [tuple(next(fresh) for _ in range(SYSTEM_BLOCKS)) for _ in range(NUM_SYSTEMS)]
    recent: list[tuple[int, ...]] = []
    requests = []
    for number in range(num_requests):
        if recent and rng.random() < 0.8:
            path = recent.pop(rng.randrange(len(recent))) + tuple(next(fresh) for _ in range(rng.randrange(1, 8)))
        else:
            path = rng.choice(systems) + tuple(next(fresh) for _ in range(rng.randrange(1, 40)))
        recent = [*recent[-200:], path] if len(path) < MOST_BLOCKS else recent
        requests.append(KvtRequest(float(number), -1, -1, BLOCK_TOKENS * len(path), 1, path))
    return ReplayTrace("made up", BLOCK_TOKENS, tuple(requests))


def _playing(arrays: TraceArrays, setup: Setup) -> Callable[[], object]:
    return lambda: compiled.play(arrays, setup)


def _libcachesim(arrays: TraceArrays, num_blocks: int, folder: Path) -> tuple[str, Callable[[], object]] | None:
    try:
        import libcachesim as library  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    records = np.zeros(len(arrays.ids), RECORD)
    records["time"], records["block"], records["size"] = np.arange(len(arrays.ids)), arrays.ids, 1
    records["next"] = -1  # LRU does not look at it
    path = folder / "trace.oracleGeneral"
    records.tofile(path)

    def process() -> Any:
        reader = library.TraceReader(trace=str(path), trace_type=library.TraceType.ORACLE_GENERAL_TRACE)
        return library.LRU(cache_size=num_blocks, hashpower=20).process_trace(reader)

    return "libcachesim's LRU of blocks", process


def _ordered_dict(arrays: TraceArrays, num_blocks: int) -> tuple[str, Callable[[], object]]:
    ids = arrays.ids.tolist()

    def process() -> int:
        cache: OrderedDict[int, None] = OrderedDict()
        hits = 0
        for block in ids:
            if block in cache:
                hits += 1
                cache.move_to_end(block)
                continue
            if len(cache) == num_blocks:
                cache.popitem(last=False)
            cache[block] = None
        return hits

    return "OrderedDict as an LRU of blocks (libcachesim is not installed)", process
