"""How fast a CPU device gathers and scatters, against one memcpy of the same bytes.

    python -m tests.bench.bench_device [--json FILE]

Each workload is a large engine memory and a large slab, so that nothing is in a cache; pages and slots are drawn at
random for every copy. The ways take turns in one loop, and the figures are medians of CPU time, so that they hold on a
busy machine: GB per second of CPU time, and the ratio to memcpy in the same run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.devices.base import PageTable
from kvstore.devices.cpu import CpuDevice
from kvstore.devices.tables import paged_table, token_table

MiB = 1 << 20
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Workload:
    """An engine's memory: `pieces` tensors; paged with one run of `run_bytes` a block, or tokens of `heads` heads.

    pages: copied by one call.
    """

    name: str
    pieces: int
    run_bytes: int
    pages: int
    heads: int = 0

    @property
    def page_bytes(self) -> int:
        return self.pieces * self.run_bytes * max(1, self.heads)


WORKLOADS = (
    Workload("SmolLM2, 64 tokens, contiguous cache: 180 runs of 8 KiB", 60, 8192, 16, heads=3),
    Workload("SmolLM2, 16 tokens, contiguous cache: 180 runs of 2 KiB", 60, 2048, 64, heads=3),
    Workload("8B, 16 tokens, paged: 64 runs of 32 KiB", 64, 32 << 10, 16),
    Workload("small, 16 tokens, paged: 64 runs of 4 KiB", 64, 4096, 64),
    Workload("8B, 16 tokens, paged, one page a call", 64, 32 << 10, 1),
)


def run(workloads: Sequence[Workload] = WORKLOADS, pool_bytes: int = 256 * MiB, rounds: int = 15) -> dict[str, Any]:
    """Measure all workloads; the engine's memory and the slab take `pool_bytes` each."""
    engine, slab = _memory(pool_bytes), _memory(pool_bytes)
    return {
        "bench": "device",
        "machine": {
            "processor": _processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "native": CpuDevice().is_native,
        },
        "workloads": [_measure(workload, engine, slab, rounds) for workload in workloads],
    }


def _measure(workload: Workload, engine: Bytes, slab: Bytes, rounds: int) -> dict[str, Any]:
    page_bytes = workload.page_bytes
    num_pages = len(engine) // page_bytes
    table = _table(workload, engine, num_pages)
    slots = [slab[i * page_bytes : (i + 1) * page_bytes] for i in range(num_pages)]
    rng = np.random.default_rng(0)
    total_bytes = workload.pages * page_bytes
    seconds: dict[str, list[float]] = {}

    def clock(way: str, copy: Callable[[], object]) -> None:
        began = time.thread_time()
        copy()
        seconds.setdefault(way, []).append(time.thread_time() - began)

    def draw() -> tuple[list[int], list[Bytes]]:
        first = int(rng.integers(num_pages - workload.pages + 1))
        # The pages of one prompt follow each other in a contiguous cache, and lie anywhere in a paged engine.
        ids = list(range(first, first + workload.pages)) if workload.heads else rng.permutation(num_pages)
        return list(ids[: workload.pages]), [slots[i] for i in rng.permutation(num_pages)[: workload.pages]]

    devices = {"native": CpuDevice(native=True)} if CpuDevice().is_native else {}
    devices["numpy"] = CpuDevice(native=False)
    for _ in range(rounds):
        to, source = (int(i) * page_bytes for i in rng.integers(num_pages - workload.pages + 1, size=2))
        clock("memcpy", partial(np.copyto, slab[to : to + total_bytes], engine[source : source + total_bytes]))
        for name, device in devices.items():
            for way, copy in (("gather", device.copy_out), ("scatter", device.copy_in)):
                clock(f"{name} {way}", partial(copy, table, *draw()))

    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "name": workload.name,
        "mib": round(total_bytes / MiB, 1),
        "ways": {
            way: {"gb_per_cpu_s": round(total_bytes / median / 1e9, 2), "ratio": round(medians["memcpy"] / median, 2)}
            for way, median in medians.items()
        },
    }


def _table(workload: Workload, engine: Bytes, num_pages: int) -> PageTable:
    """Cut the engine's memory into the workload's tensors."""
    shape = (workload.heads, num_pages, workload.run_bytes) if workload.heads else (num_pages, workload.run_bytes)
    size = int(np.prod(shape))
    tensors = [engine[i * size : (i + 1) * size].reshape(shape) for i in range(workload.pieces)]
    return token_table(tensors, 1) if workload.heads else paged_table(tensors)


def _memory(num_bytes: int) -> Bytes:
    """Memory of huge pages, touched: what a slab is made of."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array.fill(1)
    return array


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _print_table(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(f"{machine['processor']}, Python {machine['python']}, numpy {machine['numpy']}")
    for workload in result["workloads"]:
        print(f"\n{workload['name']} ({workload['mib']} MiB a call)")
        for way, figures in workload["ways"].items():
            print(f"  {way:16} {figures['gb_per_cpu_s']:7.2f} GB/CPU-s   {figures['ratio']:5.2f} of memcpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15, help="copies of each kind per workload (default: 15)")
    arguments = parser.parse_args(argv)
    result = run(rounds=arguments.rounds)
    _print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
