"""How fast the disk tier writes and reads, against raw O_DIRECT on the same slots of the same file in the same run.

    python -m tests.bench.bench_disk [DIR] [--json FILE] [--page-kib 2048] [--pages 128] [--rounds 7]

DIR must lie on the disk to be measured. Every way uses the same host slots and batches of 16 pages; the ways take
turns, and figures are medians. Reads are cold: O_DIRECT knows no page cache. "no checksum" shows what xxh3_64 over
every byte costs; the product always has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.machine import machine, versions
from kvstore.page import PageKey, PageMeta
from kvstore.testing.pages import key_of
from kvstore.tiers.disk.tier import DiskTier
from kvstore.tiers.host import HostSlab

KiB, GiB = 1 << 10, 1 << 30
THREADS = 4
BATCH = 16
TIMEOUT_S = 120.0

Work = Callable[[Sequence[int]], None]


class Bench:
    """A full tier, the same number of host slots, and a raw descriptor of the tier's own slab file."""

    def __init__(self, path: Path, page_bytes: int, num_pages: int) -> None:
        self.page_bytes, self.num_pages = page_bytes, num_pages
        self.slab = HostSlab(num_pages, page_bytes)
        self.slab.buffer[:] = np.random.default_rng(0).integers(0, 256, self.slab.buffer.size, dtype=np.uint8)
        self.views = [self.slab.view(slot) for slot in range(num_pages)]
        self.meta = PageMeta(page_bytes)
        self.tier = DiskTier.open(path, "bench", page_bytes, num_pages * page_bytes)
        self.fd = os.open(path / "pages.slab", os.O_RDWR | (os.O_DIRECT if self.tier.is_direct else 0))
        self.pool = ThreadPoolExecutor(THREADS)
        self.generation = 0
        self.order = np.random.default_rng(1).permutation(num_pages).tolist()
        self.on_all(self.write, fresh=True)  # no way meets blocks that were never written

    def close(self) -> None:
        self.pool.shutdown()
        os.close(self.fd)
        self.tier.close()
        self.slab.close()

    def on_all(self, work: Work, *, fresh: bool = False, threads: bool = True) -> None:
        """Run `work` over all pages in random order, a batch a call."""
        self.generation += fresh
        batches = [self.order[i : i + BATCH] for i in range(0, self.num_pages, BATCH)]
        for _ in (self.pool.map if threads else map)(work, batches):
            pass

    def keys(self, pages: Sequence[int], generation: int) -> list[PageKey]:
        return [key_of((page, generation)) for page in pages]

    def write(self, pages: Sequence[int]) -> None:
        """Store new pages in place of those of the round before, as a planner would."""
        ok = self.tier.write_from(
            self.keys(pages, self.generation),
            [self.views[page] for page in pages],
            [self.meta] * len(pages),
            evict=self.keys(pages, self.generation - 1),
            timeout_s=TIMEOUT_S,
        )
        assert all(ok)

    def read(self, pages: Sequence[int]) -> None:
        views = [self.views[page] for page in pages]
        keys = self.keys(pages, self.generation)
        assert all(self.tier.read_into(keys, views, [self.meta] * len(pages), timeout_s=TIMEOUT_S))

    def raw_write(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert os.pwritev(self.fd, [self.views[page]], page * self.page_bytes) == self.page_bytes

    def raw_read(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert os.preadv(self.fd, [self.views[page]], page * self.page_bytes) == self.page_bytes


@contextmanager
def no_checksum() -> Iterator[None]:
    """The same code, with a checksum that costs nothing and always fits."""
    with mock.patch("kvstore.page._checksum", return_value=0):
        yield


def run(path: Path | None = None, *, page_kib: int = 2048, num_pages: int = 128, rounds: int = 7) -> dict[str, Any]:
    """Measure in a new directory below `path` (default: where temporary files go), which is removed again."""
    home = Path(tempfile.mkdtemp(prefix="bench-disk-", dir=path))
    try:
        with closing(Bench(home, page_kib * KiB, num_pages)) as bench, mock.patch("kvstore.lab.bench.ROUNDS", rounds):
            is_direct = bench.tier.is_direct
            # Reads come first: raw writes leave bytes behind that are no pages.
            tables = [_reads(bench), _writes(bench)]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {
        "workload": f"{num_pages} pages of {page_kib} KiB, batches of {BATCH}",
        "is_direct": is_direct,
        "machine": machine(),
        "versions": versions(),
        "tables": [_as_dict(table) for table in tables],
    }


def _reads(bench: Bench) -> Table:
    num_bytes = bench.num_pages * bench.page_bytes

    def unchecked() -> None:
        with mock.patch("kvstore.tiers.disk.tier.verify_page", return_value=True):
            bench.on_all(bench.read)

    return measure(
        "cold read",
        "bytes",
        [
            Case(f"raw O_DIRECT, {THREADS} threads", lambda: bench.on_all(bench.raw_read), num_bytes),
            Case(f"disk tier, {THREADS} threads", lambda: bench.on_all(bench.read), num_bytes),
            Case(f"disk tier, {THREADS} threads, no checksum", unchecked, num_bytes),
            Case("raw O_DIRECT, 1 thread", lambda: bench.on_all(bench.raw_read, threads=False), num_bytes),
            Case("disk tier, 1 thread", lambda: bench.on_all(bench.read, threads=False), num_bytes),
        ],
    )


def _writes(bench: Bench) -> Table:
    num_bytes = bench.num_pages * bench.page_bytes

    def unchecked() -> None:
        with no_checksum():
            bench.on_all(bench.write, fresh=True)

    return measure(
        "write",
        "bytes",
        [
            Case(f"raw O_DIRECT, {THREADS} threads", lambda: bench.on_all(bench.raw_write), num_bytes),
            Case(f"disk tier, {THREADS} threads", lambda: bench.on_all(bench.write, fresh=True), num_bytes),
            Case(f"disk tier, {THREADS} threads, no checksum", unchecked, num_bytes),
            Case("raw O_DIRECT, 1 thread", lambda: bench.on_all(bench.raw_write, threads=False), num_bytes),
            Case("disk tier, 1 thread", lambda: bench.on_all(bench.write, fresh=True, threads=False), num_bytes),
        ],
    )


def _as_dict(table: Table) -> dict[str, Any]:
    ways = [
        {
            "way": timing.name,
            "gb_per_s": timing.per_s / 1e9,
            "ratio": timing.ratio,
            "cpu_ms_per_gib": timing.cpu_s * 1e3 / (timing.amount / GiB),
        }
        for timing in table.timings
    ]
    return {"name": table.name, "ways": ways}


def _print(result: dict[str, Any]) -> None:
    print(f"{result['workload']}{'' if result['is_direct'] else ' (no O_DIRECT here)'}")
    for table in result["tables"]:
        print(f"\n{table['name']}")
        for way in table["ways"]:
            print(
                f"  {way['way']:36} {way['gb_per_s']:6.2f} GB/s  {way['ratio']:5.2f} of raw  "
                f"{way['cpu_ms_per_gib']:6.0f} CPU-ms/GiB"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, nargs="?", help="a directory on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page-kib", type=int, default=2048)
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    result = run(arguments.dir, page_kib=arguments.page_kib, num_pages=arguments.pages, rounds=arguments.rounds)
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
