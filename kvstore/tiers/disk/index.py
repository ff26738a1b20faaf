"""The disk tier's index: small records in LMDB, shared by all processes on one directory.

    pages, order     records by key, and the order of their use (page_table.py)
    free, writing    slots that nobody has, and those handed out (slots.py)
    meta             what the directory is made for, and the slots' counters (meta.py)

This module is the transactions over these tables; it alone knows what has to change together.

To store a page a caller claims a slot (one short transaction), writes the bytes outside any transaction, and publishes
(another one). Whoever dies between leaves a claim of a writer that no longer lives; it is taken back when room is
needed. Stamps and generations come from one counter that only grows, so a slot that was given away and filled again is
told from what it was.

Room is made by whoever asks for it: `claim` first takes what the caller names (`evict`). The order of use that is kept
here is for those who have no order of their own in memory: a planner that starts anew (`scan`), an engine's own tier,
which has no planner, and a directory that several processes fill, of which each planner knows its own pages only.
There, and only there, `claim` evicts by that order (docs/design.md, "One ruler of the disk").

Transactions are short and none is held across I/O: a reader that stays keeps writers waiting (index_snapshots.py). Any
thread; writers wait for each other, and for readers, with a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lmdb

from kvstore.errors import CorruptPage, TierUnavailable
from kvstore.page import PageKey
from kvstore.tiers.disk.directory_lock import DirectoryLock
from kvstore.tiers.disk.index_snapshots import IndexSnapshots
from kvstore.tiers.disk.meta import Geometry, MetaTable
from kvstore.tiers.disk.page_table import DiskPageTable, R, ScanPosition
from kvstore.tiers.disk.record import PageRecord
from kvstore.tiers.disk.slots import AllocatorState, Reservation, SlotAllocator, Txn

_SET_UP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Written:
    """A claimed slot whose bytes are on their way to the disk, ready to be published."""

    key: PageKey
    claim: Reservation
    raw_header: bytes
    expires_at: float
    tokens: bytes


@dataclass(slots=True)
class Claimed:
    """Answers to `claim`, one per key: a Claim to be written, True for a page that is there, False for no room."""

    answers: list[Reservation | bool] = field(default_factory=list)
    evicted: int = 0
    damaged: int = 0


@dataclass(slots=True)
class FoundRecords:
    """Answers to `find`, one per key; `damaged` are the keys whose record is no longer what was written.

    snapshot: the number of the index's state that they are from.
    """

    records: list[PageRecord | None] = field(default_factory=list)
    damaged: list[PageKey] = field(default_factory=list)
    snapshot: int = -1


class DiskIndex:
    """Records and slots of one directory. See the head of the module for the tables."""

    def __init__(self, env: lmdb.Environment, lock: DirectoryLock | None) -> None:
        """Take an environment that is open without LMDB's own locks.

        lock: by which processes on the directory know of each other; it is for reading if the environment is. None
              where nobody else is there: a copy, or a medium that nobody can write.
        Raises CorruptPage or lmdb.Error if it is not an index.
        """
        self._env = env
        self._lock = lock
        self._is_writable = not env.flags()["readonly"]
        self._snapshots = None if lock is None else IndexSnapshots(env, lock)
        self._orphans: list[Reservation] = []  # claims that could be neither published nor freed
        self._pages = DiskPageTable(self._table(b"pages"), self._table(b"order"))
        self._meta = MetaTable(self._table(b"meta"))
        is_alive = lock.is_alive if lock else lambda _: True
        self._slots = SlotAllocator(self._table(b"free"), self._table(b"writing"), is_alive)

    # Setting up.

    def geometry(self) -> Geometry | None:
        """The directory's layout; None if it is new. Raises CorruptPage or LayoutMismatch (other version)."""
        with self._read() as txn:
            return self._meta.geometry(txn)

    def num_slots(self) -> int:
        """Slots of the directory. Raises CorruptPage."""
        with self._read() as txn:
            return self._meta.state(txn).num_slots

    def set_up(self, geometry: Geometry, num_slots: int) -> None:
        """Write the geometry of a new directory, or grow the number of slots of one that is there."""
        with self._write(time.monotonic() + _SET_UP_TIMEOUT_S) as (txn, state):
            self._meta.set_geometry(txn, geometry)
            state.num_slots = max(state.num_slots, num_slots)

    @property
    def map_bytes(self) -> int:
        """The address space it may use."""
        return int(self._env.info()["map_size"])

    def grow_map(self, map_bytes: int) -> None:
        """Give the index more address space. No transaction of this process may be open."""
        if map_bytes > self.map_bytes:
            self._env.set_mapsize(map_bytes)

    def enter(self, slots_in_file: int) -> int:
        """Become a writer, take back what dead ones left, and drop pages beyond the file's end; return how many."""
        assert self._lock is not None
        with self._write(time.monotonic() + _SET_UP_TIMEOUT_S) as (txn, state):
            self._slots.writer, state.next_writer = state.next_writer, state.next_writer + 1
            self._lock.live(self._slots.writer)
            self._slots.reclaim(txn)
            lost = self._pages.beyond(txn, slots_in_file) if slots_in_file < state.high_water else []
            for key in lost:
                self._remove(txn, state, key)
            if state.leaked:
                self._repair(txn, state)
            return len(lost)

    # Reading.

    def find(self, keys: Sequence[PageKey]) -> FoundRecords:
        """The records of `keys`, in one read transaction."""
        found = FoundRecords()
        with self._read() as txn:
            found.snapshot = txn.id()
            for key in keys:
                record = None
                try:
                    record = self._pages.get(txn, key)
                except CorruptPage:
                    found.damaged.append(key)
                found.records.append(record)
        return found

    def still_there(self, records: Sequence[PageRecord], since: int = -1) -> list[bool]:
        """Which records still describe the same copies; a touch meanwhile does not matter.

        since: the snapshot that they are from. Nothing has to be read again if it is the last one still: whoever was
               given a slot writes into it after the commit that gave it, and commits of all processes are seen here.
        """
        if self._env.info()["last_txnid"] == since:
            return [True] * len(records)
        with self._read() as txn:
            return [self._pages.is_same(txn, record) for record in records]

    def scan(
        self, position: ScanPosition | None, decode: Callable[[bytes, bytes], R]
    ) -> tuple[list[R], ScanPosition | None]:
        """Some records, least recently used first, and where to go on; None at the end.

        decode: `decode_record`, or `decode_scanned` where that is enough.
        Ends with what was there when it began: a page used meanwhile is missed, since whoever used it knows it.
        """
        with self._read() as txn:
            return self._pages.scan(txn, position or ScanPosition(0, self._meta.state(txn).clock), decode)

    def keys(self) -> list[PageKey]:
        """The keys of all records, also of damaged ones."""
        with self._read() as txn:
            return self._pages.keys(txn)

    def usage(self) -> dict[str, int]:
        """Slots by state; `slots` is their sum and those never used."""
        with self._read() as txn:
            state = self._meta.state(txn)
            pages = self._pages.count(txn)
            free, writing = self._slots.counts(txn, state)
        return {
            "slots": state.num_slots,
            "pages": pages,
            "writing": writing,
            "free": free,
            "leaked": state.num_slots - pages - free - writing,
        }

    # Writing.

    def claim(self, keys: Sequence[PageKey], evict: Sequence[PageKey], *, now: float, deadline: float) -> Claimed:
        """Remove `evict`, then hand out a slot for each of the (distinct) `keys` that is not there."""
        claimed = Claimed()
        orphans: list[Reservation] = []
        try:
            with self._write(deadline) as (txn, state):
                orphans, self._orphans = self._orphans, []
                for claim in orphans:
                    self._slots.give_back(txn, claim)
                spare = [slot for key in evict if (slot := self._unlink(txn, state, key)) is not None]
                claimed.answers.extend(self._is_stored(txn, state, key, now, claimed) for key in keys)
                missing = [position for position, stored in enumerate(claimed.answers) if not stored]
                # The victims' slots go to the new pages without a way through the table of free ones.
                for slot in spare[len(missing) :]:
                    self._slots.free(txn, slot)
                slots, claimed.evicted = self._take(txn, state, len(missing), spare[: len(missing)], set(keys), now)
                for position, slot in zip(missing, slots, strict=False):
                    claimed.answers[position] = self._slots.claim(txn, state, slot)
        except BaseException:
            self._orphans.extend(orphans)  # the transaction did not happen
            raise
        return claimed

    def publish(self, pages: Sequence[Written], failed: Sequence[Reservation], *, deadline: float) -> list[bool]:
        """Make written pages visible, in this order of use, and give the slots of `failed` claims back.

        False where the claim is no longer ours. A key that somebody else published first keeps its bytes and answers
        True.
        """
        answers = []
        with self._write(deadline) as (txn, state):
            for claim in failed:
                self._slots.give_back(txn, claim)
            for page in pages:
                if not self._slots.settle(txn, page.claim):
                    answers.append(False)
                    continue
                answers.append(True)
                if not self._pages.add(
                    txn,
                    page.key,
                    state.tick(),
                    raw_header=page.raw_header,
                    slot=page.claim.slot,
                    expires_at=page.expires_at,
                    tokens=page.tokens,
                ):
                    self._slots.free(txn, page.claim.slot)
        return answers

    def abandon(self, claims: Sequence[Reservation]) -> None:
        """Remember claims that could not be published; the next `claim` gives them back."""
        self._orphans.extend(claims)

    def touch(self, keys: Sequence[PageKey], expires_at: float, *, now: float, deadline: float) -> list[bool]:
        """Make keys the most recent ones, in this order, and move their deadline if `expires_at` is not 0."""
        answers = []
        with self._write(deadline) as (txn, state):
            for key in keys:
                record = None
                with contextlib.suppress(CorruptPage):
                    record = self._pages.get(txn, key)
                if record is None or record.is_expired(now):
                    answers.append(False)
                    continue
                self._pages.touch(txn, key, record, state.tick(), expires_at)
                answers.append(True)
        return answers

    def delete(self, keys: Sequence[PageKey], *, deadline: float) -> None:
        """Remove pages; unknown keys are ignored."""
        with self._write(deadline) as (txn, state):
            for key in keys:
                self._remove(txn, state, key)

    def drop(self, records: Sequence[PageRecord], damaged: Sequence[PageKey], *, deadline: float) -> None:
        """Remove copies that turned out to be bad, unless something else has taken their place since.

        At the best of it: where the index cannot be written now, the next reader finds the same.
        """
        try:
            with self._write(deadline) as (txn, state):
                for key in damaged:
                    with contextlib.suppress(CorruptPage):
                        self._pages.get(txn, key)
                        continue
                    self._remove(txn, state, key)
                for record in records:
                    if self._pages.is_same(txn, record):
                        self._remove(txn, state, record.header.key)
        except (TierUnavailable, lmdb.MapFullError, lmdb.DiskError):
            return
        except lmdb.Error as error:
            if not is_read_only(error):
                raise

    def close(self) -> None:
        """Close the environment. No other call may be under way."""
        self._env.close()

    # Transactions.

    def _table(self, name: bytes) -> Any:
        if not self._is_writable:
            with self._read():  # LMDB opens a table in a transaction of its own; this one keeps its pages in place
                return self._env.open_db(name, create=False)
        assert self._lock is not None
        with self._lock.writing(time.monotonic() + _SET_UP_TIMEOUT_S):
            return self._env.open_db(name)

    def _read(self) -> contextlib.AbstractContextManager[Txn]:
        return self._env.begin() if self._snapshots is None else self._snapshots.reading()

    @contextlib.contextmanager
    def _write(self, deadline: float) -> Iterator[tuple[Txn, AllocatorState]]:
        assert self._lock is not None
        assert self._snapshots is not None
        with self._lock.writing(deadline):
            with self._env.begin(write=True) as txn:
                number = txn.id()
                self._snapshots.wait_for_readers(number - 2, deadline)
                state = self._meta.state(txn)
                before = state.encode()
                yield txn, state
                after = state.encode()
                if after != before:
                    self._meta.set_state(txn, after)
            self._snapshots.note(number)

    # Pages that leave.

    def _is_stored(self, txn: Txn, state: AllocatorState, key: PageKey, now: float, claimed: Claimed) -> bool:
        """True if the page is there to stay; what is expired or damaged is removed first."""
        try:
            record = self._pages.get(txn, key)
        except CorruptPage:
            claimed.damaged += 1
        else:
            if record is None:
                return False
            if not record.is_expired(now):
                return True
        self._remove(txn, state, key)
        return False

    def _remove(self, txn: Txn, state: AllocatorState, key: bytes) -> None:
        slot = self._unlink(txn, state, key)
        if slot is not None:
            self._slots.free(txn, slot)

    def _unlink(self, txn: Txn, state: AllocatorState, key: bytes) -> int | None:
        """Forget a record; the slot it named, if there was one and it can be trusted."""
        try:
            return self._pages.pop(txn, key)
        except CorruptPage:
            state.leaked += 1
            return None

    # Room.

    def _take(
        self, txn: Txn, state: AllocatorState, count: int, spare: list[int], keep: set[PageKey], now: float
    ) -> tuple[list[int], int]:
        """`spare` and more, up to `count` slots, and how many pages were evicted. The least disturbing source first."""
        slots = spare + self._slots.take(txn, state, count - len(spare))
        if len(slots) < count and self._slots.reclaim(txn):
            slots += self._slots.take(txn, state, count - len(slots))
        if len(slots) < count and state.leaked:
            self._repair(txn, state)
            slots += self._slots.take(txn, state, count - len(slots))
        # Nobody named enough: others store here too, or there is no planner. A planner alone knows what fits.
        victims: list[PageKey] = []
        if len(slots) < count:
            victims, damaged = self._pages.oldest(txn, count - len(slots), keep, now)
            for key in damaged + victims:
                self._remove(txn, state, key)
        slots += self._slots.take(txn, state, count - len(slots))
        return slots, len(victims)

    def _repair(self, txn: Txn, state: AllocatorState) -> None:
        """Drop damaged records, free the slots they held, and make the order anew. One pass over the index."""
        self._slots.rebuild(txn, state, self._pages.rebuild(txn))


def is_read_only(error: lmdb.Error) -> bool:
    """True if a change failed because the filesystem takes no writes any more."""
    return isinstance(error, lmdb.ReadonlyError) or os.strerror(errno.EROFS) in str(error)
