"""Write pages to a disk tier and read them back cold, over raw O_DIRECT transfers in the same slab file.

The raw transfers use slots of the file that the tier never fills, have no index and no checksum. O_DIRECT passes the
page cache by, so every read is a cold one. Works in a directory of its own, which is removed again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from kvstore.errors import ConfigError
from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.peers import PlainFiles
from kvstore.page import PageKey, PageMeta, page_key
from kvstore.tiers.disk.slab_file import SlabFile
from kvstore.tiers.disk.tier import DiskTier
from kvstore.tiers.host import HostSlab
from kvstore.units import KiB, MiB

PAGE_SIZES = (256 * KiB, 2 * MiB)
TOTAL_BYTES = 128 * MiB
QUICK_BYTES = 32 * MiB
THREADS = 4
BATCH_PAGES = 8  # pages a lane hands over at once
TIMEOUT_S = 120.0


def run(argument: str, quick: bool, peer: bool = False) -> list[Table]:
    """Measure pages of 256 KiB and 2 MiB in a new directory inside `argument`; with `peer`, files of one page each too.

    Raises ConfigError if the directory cannot be made or has no room.
    """
    tables = []
    for page_bytes in PAGE_SIZES:
        num_pages = (QUICK_BYTES if quick else TOTAL_BYTES) // page_bytes
        with _directory(argument) as path:
            tables += _measure(path, page_bytes, num_pages, quick, peer)
    return tables


@contextmanager
def _directory(parent: str) -> Iterator[Path]:
    try:
        path = Path(tempfile.mkdtemp(prefix="kvstore-bench-", dir=parent))
    except OSError as error:
        raise ConfigError(f"bench disk: cannot make a directory in {parent}: {error.strerror}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _measure(path: Path, page_bytes: int, num_pages: int, quick: bool, peer: bool) -> list[Table]:
    keys = [page_key(os.urandom(32)) for _ in range(num_pages)]
    metas = [PageMeta(page_bytes)] * num_pages
    order = np.random.default_rng(0).permutation(num_pages).tolist()
    with (
        closing(HostSlab(num_pages, page_bytes)) as slab,
        closing(DiskTier.open(path, "bench", page_bytes, 2 * num_pages * page_bytes)) as tier,
        closing(SlabFile(path / "pages.slab", page_bytes)) as file,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        slab.buffer[:] = np.random.default_rng(1).integers(0, 256, slab.buffer.size, dtype=np.uint8)
        views = [slab.view(i) for i in range(num_pages)]
        unused = range(num_pages, 2 * num_pages)  # slots that the tier, never holding more than num_pages, does not use

        def write(pages: Sequence[int]) -> None:
            _expect(tier.write_from(*_columns(pages, keys, views, metas), timeout_s=TIMEOUT_S))

        def read(pages: Sequence[int]) -> None:
            _expect(tier.read_into(*_columns(pages, keys, views, metas), timeout_s=TIMEOUT_S))

        def raw_write(pages: Sequence[int]) -> None:
            for page in pages:
                file.write(unused[page], views[page], page_bytes)

        def raw_read(pages: Sequence[int]) -> None:
            for page in pages:
                file.read(unused[page], views[page], page_bytes)

        def empty() -> None:
            tier.delete(keys, timeout_s=TIMEOUT_S)

        folder = path / "files"
        folder.mkdir()
        files = PlainFiles(folder, views)

        def cases(raw: Callable[[Sequence[int]], None], ours: Callable[[Sequence[int]], None], verb: str) -> list[Case]:
            prepare = empty if ours is write else None
            num_bytes = num_pages * page_bytes
            theirs, cold = (files.write, None) if ours is write else (files.read, lambda: files.cool(order))
            name = f"peer: a file for each page, {THREADS} threads"
            return [
                Case(f"raw {verb}, {THREADS} threads", lambda: _spread(pool, raw, order), num_bytes),
                Case(f"disk tier, {THREADS} threads", lambda: _spread(pool, ours, order), num_bytes, prepare),
                Case(f"raw {verb}, 1 thread", lambda: _in_turn(raw, order), num_bytes),
                Case("disk tier, 1 thread", lambda: _in_turn(ours, order), num_bytes, prepare),
                *([Case(name, lambda: _spread(pool, theirs, order), num_bytes, cold)] if peer else []),
            ]

        what = f"{num_pages} pages of {page_bytes // KiB} KiB" + ("" if tier.is_direct else " (no O_DIRECT here)")
        written = measure(f"write {what}", "bytes", cases(raw_write, write, "write"), quick=quick)
        return [written, measure(f"read {what}", "bytes", cases(raw_read, read, "read"), quick=quick)]


def _columns(
    pages: Sequence[int], keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta]
) -> tuple[list[PageKey], list[memoryview], list[PageMeta]]:
    return [keys[i] for i in pages], [views[i] for i in pages], [metas[i] for i in pages]


def _spread(pool: ThreadPoolExecutor, work: Callable[[Sequence[int]], None], pages: Sequence[int]) -> None:
    batches = (pages[i : i + BATCH_PAGES] for i in range(0, len(pages), BATCH_PAGES))
    for done in [pool.submit(work, batch) for batch in batches]:
        done.result()


def _in_turn(work: Callable[[Sequence[int]], None], pages: Sequence[int]) -> None:
    for i in range(0, len(pages), BATCH_PAGES):
        work(pages[i : i + BATCH_PAGES])


def _expect(answers: Sequence[bool]) -> None:
    if not all(answers):
        raise RuntimeError(f"bench disk: {answers.count(False)} of {len(answers)} pages were refused")
