"""Looks at a disk tier's directory without any configuration: what is in it, and is every page what was written?

For the command line. Reads only, also beside processes that use the directory; a page that one of them removes
meanwhile is left out.
"""

from __future__ import annotations

import mmap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from kvstore.page import PageKey, verify_page
from kvstore.tiers.disk.directory import DiskDirectory
from kvstore.tiers.disk.open_directories import acquire, release
from kvstore.tiers.disk.record import PageRecord, decode_record

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class PageCheck:
    """The result of `verify` for one page. `record` is None where the index record itself is damaged."""

    key: PageKey
    ok: bool
    reason: str
    record: PageRecord | None = None


def describe(path: str | PathLike[str]) -> dict[str, Any]:
    """Geometry and contents of a directory as plain values. Raises ConfigError, LayoutMismatch or TierUnavailable."""
    now = time.time()
    expired = 0
    stored_bytes = written_day_bytes = 0
    depths: Counter[int] = Counter()
    created: list[float] = []
    with _reading(path) as directory:
        for record in _records(directory):
            expired += record.is_expired(now)
            stored_bytes += record.header.stored_bytes
            written_day_bytes += record.header.stored_bytes * (record.header.created_at > now - DAY_S)
            depths[record.header.depth] += 1
            created.append(record.header.created_at)
        with directory.use() as index:
            usage = index.usage()
        geometry = directory.geometry
        return {
            "path": str(path),
            "format_version": geometry.version,
            "layout": geometry.layout,
            "slot_bytes": geometry.slot_bytes,
            "capacity_bytes": usage["slots"] * geometry.slot_bytes,
            "slots": usage["slots"],
            "pages": usage["pages"],
            "free": usage["free"],
            "writing": usage["writing"],
            "expired": expired,
            "stored_bytes": stored_bytes,
            "written_day_bytes": written_day_bytes,
            "oldest_created_at": min(created, default=None),
            "newest_created_at": max(created, default=None),
            "pages_by_depth": dict(sorted(depths.items())),
        }


def verify(path: str | PathLike[str]) -> Iterator[PageCheck]:
    """Read and check every page of a directory, one after the other. Raises as `describe` does."""
    with _reading(path) as directory:
        with directory.use() as index:
            keys = index.keys()
        slot = memoryview(mmap.mmap(-1, directory.geometry.slot_bytes))
        for key in keys:
            check = _check(directory, key, slot)
            if check is not None:
                yield check


@contextmanager
def _reading(path: str | PathLike[str]) -> Iterator[DiskDirectory]:
    directory = acquire(Path(path), read_only=True)
    try:
        yield directory
    finally:
        release(directory)


def _records(directory: DiskDirectory) -> Iterator[PageRecord]:
    position = None
    while True:
        with directory.use() as index:
            records, position = index.scan(position, decode_record)
        yield from records
        if position is None:
            return


def _check(directory: DiskDirectory, key: PageKey, slot: memoryview) -> PageCheck | None:
    """None where the page left while it was looked at."""
    with directory.use() as index:
        found = index.find([key])
        record = found.records[0]
        if found.damaged:
            return PageCheck(key, False, "the index record does not fit its checksum")
        if record is None:
            return None
        num_bytes = record.header.stored_bytes
        try:
            is_there = num_bytes <= len(slot) and directory.slab.read(record.slot, slot, num_bytes)
        except OSError as error:
            return PageCheck(key, False, f"slot {record.slot} cannot be read: {error}", record)
        if is_there and verify_page(record.raw_header, record.header, record.tokens, slot[:num_bytes]):
            return PageCheck(key, True, "", record)
        if not index.still_there([record])[0]:
            return None
        reason = "does not fit its checksum" if is_there else "lies beyond the end of the slab file"
        return PageCheck(key, False, f"slot {record.slot} {reason}", record)
