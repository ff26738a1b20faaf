"""How fast bytes go into and out of host slots, against libc memcpy of the same bytes in the same run.

    python -m tests.bench.bench_host [--json FILE] [--page-kib 2048] [--pages 128] [--rounds 9]

"save" copies engine memory into slots, "load" copies slots into engine memory, pages in random order. Kinds of slab:
private and shared memory, with and without huge pages. "make" is what a slab costs until its first byte is in place.
The ways take turns, and figures are medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.machine import machine, versions
from kvstore.tiers.host import HostSlab

KiB = 1 << 10
THREADS = 2
SLABS: dict[str, dict[str, Any]] = {
    "private, huge pages": {},
    "private, 4 KiB pages": {"huge_pages": False},
    "shared, huge pages where the kernel has them": {"shared_name": "bench"},
}
Bytes = npt.NDArray[np.uint8]
Copy = Callable[[Bytes, Bytes], None]


def libc_memcpy(target: Bytes, source: Bytes) -> None:
    ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)


def run(*, page_kib: int = 2048, num_pages: int = 128, rounds: int = 9) -> dict[str, Any]:
    """Measure slabs of `num_pages` pages."""
    with mock.patch("kvstore.lab.bench.ROUNDS", rounds):
        tables = [_copies(page_kib * KiB, num_pages), _making(page_kib * KiB, num_pages)]
    return {
        "workload": f"{num_pages} pages of {page_kib} KiB in random order",
        "machine": machine(),
        "versions": versions(),
        "tables": [_as_dict(table) for table in tables],
    }


def _copies(page_bytes: int, num_pages: int) -> Table:
    order = np.random.default_rng(0).permutation(num_pages).tolist()
    num_bytes = 2 * num_pages * page_bytes
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        engine = stack.enter_context(closing(HostSlab(num_pages, page_bytes)))
        slabs = {
            name: stack.enter_context(closing(HostSlab(num_pages, page_bytes, **kind))) for name, kind in SLABS.items()
        }

        def save_and_load(slab: HostSlab, copy: Copy, slots: Sequence[int]) -> None:
            for slot in slots:
                copy(slab.array(slot), engine.array(slot))
            for slot in slots:
                copy(engine.array(slot), slab.array(slot))

        def in_threads(slab: HostSlab) -> None:
            halves = [order[i::THREADS] for i in range(THREADS)]
            for _ in pool.map(lambda slots: save_and_load(slab, np.copyto, slots), halves):
                pass

        first = next(iter(slabs.values()))
        cases = [Case("libc memcpy", lambda: save_and_load(first, libc_memcpy, order), num_bytes)]
        cases += [
            Case(f"np.copyto: {name}", partial(save_and_load, slab, np.copyto, order), num_bytes)
            for name, slab in slabs.items()
        ]
        cases.append(Case(f"np.copyto, {THREADS} threads: private, huge pages", lambda: in_threads(first), num_bytes))
        return measure("save and load", "bytes", cases)


def _making(page_bytes: int, num_pages: int) -> Table:
    def make(options: dict[str, Any]) -> None:
        HostSlab(num_pages, page_bytes, **options).close()

    def untouched() -> None:
        with closing(HostSlab(num_pages, page_bytes, prefault=False, huge_pages=False)) as slab:
            slab.buffer[::4096] = 1

    num_bytes = num_pages * page_bytes
    cases = [Case("touched page by page", untouched, num_bytes)]
    cases += [Case(name, partial(make, kind), num_bytes) for name, kind in SLABS.items()]
    return measure("make", "bytes", cases)


def _as_dict(table: Table) -> dict[str, Any]:
    ways = [
        {
            "way": timing.name,
            "gb_per_s": timing.per_s / 1e9,
            "ratio": timing.ratio,
            "gb_per_cpu_s": timing.amount / timing.cpu_s / 1e9,
        }
        for timing in table.timings
    ]
    return {"name": table.name, "ways": ways}


def _print(result: dict[str, Any]) -> None:
    print(result["workload"])
    for table in result["tables"]:
        print(f"\n{table['name']}")
        for way in table["ways"]:
            print(
                f"  {way['way']:56} {way['gb_per_s']:6.2f} GB/s  {way['ratio']:5.2f} of the first  "
                f"{way['gb_per_cpu_s']:6.2f} GB/CPU-s"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page-kib", type=int, default=2048)
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    result = run(page_kib=arguments.page_kib, num_pages=arguments.pages, rounds=arguments.rounds)
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
