"""The disk tier: pages in a slab file, found through an LMDB index. Fixed capacity, shared by processes, still there
after kill -9.

    write   claim slots (transaction) -> write the bytes -> publish the records (transaction)
    read    look the records up (transaction) -> read the bytes -> verify -> look the records up again

So no transaction is held while bytes move, a page is visible whole or not at all, and a reader that another process has
overtaken notices twice: the bytes do not fit the checksum, which is bound to the key, and the record is gone or names
another generation.

Who leaves when there is no room: a planner names its victims (`evict`), and the index evicts by its own order only what
no planner can have named: pages of others in a shared directory, and any where there is no planner.

Deadlines are kept for everything that waits for other processes; a file that hangs in the kernel cannot be interrupted.
Any thread, several at once: no threads of its own.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from kvstore.codecs.coder import PageCoder
from kvstore.direction import Direction
from kvstore.errors import ConfigError, RequestError, TierFull, TierRefused, TierUnavailable
from kvstore.layout import SLOT_ALIGNMENT
from kvstore.page import PageKey, PageMeta, encode_header
from kvstore.tiers.base import StoredPage, TierCounters
from kvstore.tiers.disk.directory import DiskDirectory
from kvstore.tiers.disk.index import DiskIndex, FoundRecords, Written
from kvstore.tiers.disk.index_map import IndexMapFull
from kvstore.tiers.disk.meta import Geometry
from kvstore.tiers.disk.open_directories import acquire, release
from kvstore.tiers.disk.page_bytes import PageBytes, ReadResult
from kvstore.tiers.disk.page_table import ScanPosition
from kvstore.tiers.disk.record import PageRecord, ScannedRecord, decode_scanned
from kvstore.tiers.disk.slots import Reservation

T = TypeVar("T")

_SCAN_TIMEOUT_S = 2.0  # for a batch of expired pages; what is not dropped in time stays, and is evicted first

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTier:
    """Pages on a local disk. See `open`."""

    def __init__(
        self, directory: DiskDirectory, *, read_only: bool, now: Callable[[], float], name: str, coder: PageCoder
    ) -> None:
        """Use `open`."""
        self.name = name
        self._pages = PageBytes(directory, coder)
        self.counters = TierCounters(lost_pages=directory.lost_pages)
        self.counters.extra.update(read_errors=0, write_errors=0, no_room=0, map_full=0, too_large=0, unreadable=0)
        coder.count_in(self.counters.extra)
        self.has_room_for = coder.has_room_for if coder.loss else None
        self._directory = directory
        self._read_only = read_only
        self._now = now
        self._slot_bytes = directory.geometry.slot_bytes
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        layout_fingerprint: str,
        slot_bytes: int,
        capacity_bytes: int,
        *,
        direct: bool = True,
        read_only: bool = False,
        shared: bool = True,
        now: Callable[[], float] = time.time,
        name: str = "disk",
        coder: PageCoder | None = None,
    ) -> DiskTier:
        """Open the directory at `path`, creating or growing it to `capacity_bytes` (rounded down to whole slots).

        direct:    O_DIRECT where the filesystem has it; False always goes through the page cache.
        read_only: nothing is written, not even a touch; the capacity is what is there.
        shared:    False for the only tier that stores there, in any process; readers are let in.
        now:       Unix seconds, for deadlines of pages.
        coder:     what pages are stored in; None stores them as they are. What it makes of a page, or leaves it, must
                   fit `slot_bytes`, or the page is not stored.

        Every page published before is found again. Raises ConfigError naming `disk.path`, `disk.capacity_bytes` or
        `disk.shared` (no such place, no room, smaller than what is there, somebody else's), LayoutMismatch if the pages
        in it are of another layout (they stay), TierUnavailable if other processes keep it from being opened.
        """
        if slot_bytes <= 0 or slot_bytes % SLOT_ALIGNMENT:
            raise ConfigError(
                f"disk tier: slot_bytes is {slot_bytes}; it must be a positive multiple of {SLOT_ALIGNMENT}"
            )
        if capacity_bytes < slot_bytes and not read_only:
            raise ConfigError(
                f"disk.capacity_bytes is {capacity_bytes}; it must hold at least one page of {slot_bytes} bytes"
            )
        directory = acquire(
            Path(path),
            Geometry(layout_fingerprint, slot_bytes),
            capacity_bytes // slot_bytes,
            direct=direct,
            read_only=read_only,
            shared=shared,
        )
        return cls(directory, read_only=read_only, now=now, name=name, coder=coder or PageCoder())

    @property
    def capacity_pages(self) -> int | None:
        """Pages that fit."""
        return self._directory.num_slots

    @property
    def is_direct(self) -> bool:
        """True while pages bypass the page cache."""
        return self._directory.slab.is_direct

    def contains(self, keys: Sequence[PageKey], *, timeout_s: float) -> list[bool]:
        """Which keys are there, unexpired, in one read transaction."""
        deadline, now = time.monotonic() + timeout_s, self._now()
        self._check_open()

        def find(index: DiskIndex) -> FoundRecords:
            found = index.find(keys)
            self._drop(index, [], found.damaged, deadline)
            return found

        found = self._with_index(find)
        self.counters.corrupt_pages += len(found.damaged)
        return [record is not None and not record.is_expired(now) for record in found.records]

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        """Fill `views[i]` with the verified page of `keys[i]`; False where there is none.

        Raises TierUnavailable if the time ran out between pages, TierRefused if the disk gave nothing at all.
        """
        deadline = time.monotonic() + timeout_s
        self._check_open()
        return self._with_index(lambda index: self._read(index, keys, views, metas, deadline, timeout_s))

    def write_from(
        self,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        *,
        evict: Sequence[PageKey] = (),
        timeout_s: float,
    ) -> list[bool]:
        """Store pages after `evict` left; False where there was no room or the write failed.

        A full directory first takes back what dead writers held, then (only needed where several processes store)
        evicts expired and least recently used pages by itself, which is counted. Raises TierRefused if no page could be
        written.
        """
        deadline, now = time.monotonic() + timeout_s, self._now()
        self._check_open()
        if self._read_only or not (keys or evict):
            return [False] * len(keys)
        for meta in metas:
            if meta.num_bytes > self._slot_bytes and not self._pages.coder.loss:
                raise RequestError(
                    f"disk tier: a page of {meta.num_bytes} bytes does not fit slots of {self._slot_bytes}"
                )
        first: dict[PageKey, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        try:
            stored = self._with_index(lambda index: self._write(index, first, views, metas, evict, now, deadline))
        except TierFull:
            self.counters.extra["no_room"] += len(first)
            return [False] * len(keys)
        return [stored[key] for key in keys]

    def touch(self, keys: Sequence[PageKey], *, expires_at: float, timeout_s: float) -> list[bool]:
        """Make keys the most recent ones, in this order, and move their deadline if `expires_at` is not 0."""
        self._check_open()
        if self._read_only:
            return self.contains(keys, timeout_s=timeout_s)
        if not keys:
            return []
        deadline = time.monotonic() + timeout_s
        return self._change(lambda index: index.touch(keys, expires_at, now=self._now(), deadline=deadline))

    def delete(self, keys: Sequence[PageKey], *, timeout_s: float) -> None:
        """Forget pages; unknown keys are ignored."""
        self._check_open()
        if self._read_only or not keys:
            return
        deadline = time.monotonic() + timeout_s
        self._change(lambda index: index.delete(keys, deadline=deadline))

    def scan(self) -> Iterator[StoredPage]:
        """Yield what is stored and unexpired, least recently used first; holds no transaction between batches.

        Expired pages are dropped, unless the directory is only read: a planner that books what this yields counts other
        slots as free, and the index must not have to find room by its own order.
        """
        now = self._now()
        position: ScanPosition | None = None
        while True:
            self._check_open()
            records, position = self._with_index(functools.partial(self._scan, position=position, now=now))
            for key, meta, _ in records:
                if not 0 < meta.expires_at <= now:
                    yield StoredPage(key, meta)
            if position is None:
                return

    def ping(self, *, timeout_s: float) -> None:
        """Return if index and slab can be read; open a broken index again. Raises TierUnavailable."""
        self._check_open()
        self._directory.revive()
        self._with_index(functools.partial(self._ping, writable=False))

    def probe(self, way: Direction, *, timeout_s: float) -> None:
        """Return if the directory can be read, or written where `way` needs that. Raises TierRefused."""
        self._check_open()
        writable = way is not Direction.READ and not self._read_only
        self._with_index(functools.partial(self._ping, writable=writable))

    def close(self) -> None:
        """Close the directory if no other tier of this process uses it. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            release(self._directory)

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailable("disk tier: used after close")

    def _scan(
        self, index: DiskIndex, *, position: ScanPosition | None, now: float
    ) -> tuple[list[ScannedRecord], ScanPosition | None]:
        records, following = index.scan(position, decode_scanned)
        expired = [record.key for record in records if 0 < record.meta.expires_at <= now]
        found = index.find(expired).records if expired else []
        self._drop(index, [one for one in found if one and one.is_expired(now)], [], time.monotonic() + _SCAN_TIMEOUT_S)
        return records, following

    def _read(
        self,
        index: DiskIndex,
        keys: Sequence[PageKey],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        deadline: float,
        timeout_s: float,
    ) -> list[bool]:
        """Fill the views; which of them hold their page now."""
        now = self._now()
        answers = [False] * len(keys)
        found = index.find(keys)
        self.counters.corrupt_pages += len(found.damaged)
        bad: list[PageRecord] = []
        reads: list[tuple[int, PageRecord, ReadResult]] = []
        errors: list[OSError] = []
        for i, record in enumerate(found.records):
            if record is None:
                continue
            if record.is_expired(now):
                self.counters.expired_pages += 1
                bad.append(record)
            elif record.header.raw_bytes != metas[i].num_bytes:
                self.counters.corrupt_pages += 1
                bad.append(record)
            elif metas[i].tokens and metas[i].tokens != record.tokens:
                self.counters.collisions += 1  # somebody else's page: it stays
            else:
                if time.monotonic() > deadline:
                    raise TierUnavailable(f"disk tier: {len(reads)} of {len(keys)} pages read within {timeout_s} s")
                reads.append((i, record, self._pages.read(record, views[i], errors)))

        # Another process may have given a slot away while we read it. What no longer has its record is lost, not
        # corrupt, and is not served even where the bytes were still whole.
        still = index.still_there([record for _, record, _ in reads], found.snapshot)
        for (i, record, read), is_there in zip(reads, still, strict=True):
            if not is_there or read is ReadResult.SHORT:
                self.counters.lost_pages += 1
            elif read is ReadResult.TORN:
                self.counters.corrupt_pages += 1
            elif read is ReadResult.FAILED:
                self.counters.extra["read_errors"] += 1
            elif read is ReadResult.UNREADABLE:
                self.counters.extra["unreadable"] += 1
            else:
                answers[i] = True
            if read not in (ReadResult.WHOLE, ReadResult.UNREADABLE):
                bad.append(record)
        self._drop(index, bad, found.damaged, deadline)
        if reads and all(read is ReadResult.FAILED for _, _, read in reads):
            what = f"disk tier: none of {len(reads)} pages could be read from {self._directory.path}: {errors[0]}"
            raise TierRefused(what, _name_of(errors[0]))
        return answers

    def _ping(self, index: DiskIndex, *, writable: bool) -> None:
        index.usage()
        try:
            self._directory.slab.ping(writable=writable)
        except OSError as error:
            raise TierRefused(f"disk tier: {self._directory.path}: {error}", _name_of(error)) from error

    def _drop(
        self, index: DiskIndex, records: Sequence[PageRecord], damaged: Sequence[PageKey], deadline: float
    ) -> None:
        if (records or damaged) and not self._read_only:
            index.drop(records, damaged, deadline=deadline)

    def _with_index(self, call: Callable[[DiskIndex], T]) -> T:
        """Make a call into the index; once more where it failed because the index has outgrown its map."""
        try:
            with self._directory.use() as index:
                return call(index)
        except IndexMapFull as full:
            self.counters.extra["map_full"] += 1
            self._directory.enlarge_map(full)
        with self._directory.use() as index:
            return call(index)

    def _change(self, call: Callable[[DiskIndex], T]) -> T:
        """Make a call that stores no page: one that finds no room has not happened, and nobody was asking for room."""
        try:
            return self._with_index(call)
        except TierFull as error:
            raise TierRefused(str(error), "NO_ROOM") from error

    def _write(
        self,
        index: DiskIndex,
        first: dict[PageKey, int],
        views: Sequence[memoryview],
        metas: Sequence[PageMeta],
        evict: Sequence[PageKey],
        now: float,
        deadline: float,
    ) -> dict[PageKey, bool]:
        """Store the pages `keys[first[key]]`; which of them are there now."""
        keys = list(first)
        claimed = index.claim(keys, evict, now=now, deadline=deadline)
        self.counters.fallback_evictions += claimed.evicted
        self.counters.corrupt_pages += claimed.damaged
        written: list[Written] = []
        failed: list[Reservation] = []
        errors: list[OSError] = []
        try:
            for key, claim in zip(keys, claimed.answers, strict=True):
                if not isinstance(claim, Reservation):
                    continue
                if time.monotonic() > deadline:
                    failed.append(claim)
                    continue
                meta = metas[first[key]]
                view, num_bytes, codec = self._pages.encoded(key, meta, views[first[key]])
                if num_bytes > self._slot_bytes:
                    self.counters.extra["too_large"] += 1
                    failed.append(claim)
                    continue
                header = encode_header(
                    key, meta, view[:num_bytes], created_at=now, generation=claim.generation, codec=codec
                )
                try:
                    self._directory.slab.write(claim.slot, view, num_bytes)
                except OSError as error:
                    failed.append(claim)
                    errors.append(error)
                else:
                    written.append(Written(key, claim, header, meta.expires_at, meta.tokens))
            published = index.publish(written, failed, deadline=deadline)
        except BaseException:
            index.abandon([claim for claim in claimed.answers if isinstance(claim, Reservation)])
            raise
        stored = {key: claim is True for key, claim in zip(keys, claimed.answers, strict=True)}
        stored.update((page.key, ok) for page, ok in zip(written, published, strict=True))
        self._count_failures(claimed.answers.count(False), errors)
        if errors and not written and all(error.errno not in _NO_ROOM for error in errors):
            what = f"disk tier: no page could be written to {self._directory.path}: {errors[0]}"
            raise TierRefused(what, _name_of(errors[0]))
        return stored

    def _count_failures(self, refused: int, errors: Sequence[OSError]) -> None:
        full = sum(error.errno in _NO_ROOM for error in errors)
        self.counters.extra["no_room"] += refused + full
        self.counters.extra["write_errors"] += len(errors) - full


def _name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "OSError")
