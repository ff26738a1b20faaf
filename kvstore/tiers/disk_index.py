"""The disk tier's index: small records in LMDB, shared by all processes on one directory.

    pages    page key             -> record (disk_record.py)
    order    stamp u64 BE         -> page key; least recently used first
    free, writing                 -> slots (disk_slots.py)
    meta     "geometry", "state"  -> checked values: what never changes, and the allocator's counters

To store a page a caller claims a slot (one short transaction), writes the bytes outside any transaction, and publishes
(another one). Whoever dies between leaves a claim of a writer that no longer lives; it is taken back when room is
needed. Stamps and generations come from one counter that only grows, so a slot that was given away and filled again is
told from what it was.

Transactions are short and none is held across I/O: a reader that stays makes LMDB keep every page that was ever
replaced. Any thread; writers wait for each other with a deadline.
"""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lmdb

from kvstore.errors import CorruptPage, LayoutMismatch, TierUnavailable
from kvstore.page import HEADER_BYTES, KEY_BYTES, PageKey
from kvstore.tiers.directory_lock import DirectoryLock
from kvstore.tiers.disk_record import (
    PageRecord,
    decode_checked,
    decode_place,
    decode_record,
    encode_checked,
    encode_record,
)
from kvstore.tiers.disk_slots import AllocatorState, Claim, SlotAllocator, Txn

DISK_FORMAT_VERSION = 1
SCAN_BATCH = 1024  # records per read transaction of a scan: about 5 ms
EVICTION_WINDOW = 64  # how far beyond the least recently used pages an eviction looks for expired ones

_STAMP = struct.Struct(">Q")
_SET_UP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a directory is made for; pages of another layout are never put into it."""

    layout: str
    slot_bytes: int
    version: int = DISK_FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Written:
    """A claimed slot whose bytes are on their way to the disk, ready to be published."""

    key: PageKey
    claim: Claim
    raw_header: bytes
    expires_at: float
    tokens: bytes


@dataclass(slots=True)
class Claimed:
    """Answers to `claim`, one per key: a Claim to be written, True for a page that is there, False for no room."""

    answers: list[Claim | bool] = field(default_factory=list)
    evicted: int = 0
    damaged: int = 0


@dataclass(slots=True)
class Found:
    """Answers to `find`, one per key; `damaged` are the keys whose record is no longer what was written."""

    records: list[PageRecord | None] = field(default_factory=list)
    damaged: list[PageKey] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ScanPosition:
    """Stamps still to be looked at, both ends included."""

    start: int
    end: int


class DiskIndex:
    """Records and slots of one directory. See the head of the module for the tables."""

    def __init__(self, env: lmdb.Environment, lock: DirectoryLock | None) -> None:
        """Take an open environment; `lock` is None for reading only.

        Raises CorruptPage or lmdb.Error if it is not an index.
        """
        self._env = env
        self._lock = lock
        self._orphans: list[Claim] = []  # claims that could be neither published nor freed
        self._pages = self._table(b"pages")
        self._order = self._table(b"order")
        self._meta = self._table(b"meta")
        is_alive = lock.is_alive if lock else lambda _: True
        self._slots = SlotAllocator(self._table(b"free"), self._table(b"writing"), is_alive)

    # Setting up.

    def geometry(self) -> Geometry | None:
        """What the directory was made for; None if it is new. Raises CorruptPage or LayoutMismatch (other version)."""
        with self._env.begin() as txn:
            raw = txn.get(b"geometry", db=self._meta)
        if raw is None:
            return None
        fields = json.loads(decode_checked(raw))
        if fields["version"] != DISK_FORMAT_VERSION:
            raise LayoutMismatch(
                f"disk directory has format version {fields['version']}; this release reads {DISK_FORMAT_VERSION}"
            )
        return Geometry(fields["layout"], fields["slot_bytes"], fields["version"])

    def num_slots(self) -> int:
        """Slots of the directory. Raises CorruptPage."""
        with self._env.begin() as txn:
            return self._state(txn).num_slots

    def set_up(self, geometry: Geometry, num_slots: int) -> None:
        """Write the geometry of a new directory, or grow the number of slots of one that is there."""
        with self._write(time.monotonic() + _SET_UP_TIMEOUT_S) as (txn, state):
            fields = {"layout": geometry.layout, "slot_bytes": geometry.slot_bytes, "version": geometry.version}
            txn.put(b"geometry", encode_checked(json.dumps(fields).encode()), db=self._meta)
            state.num_slots = max(state.num_slots, num_slots)

    def grow_map(self, map_bytes: int) -> None:
        """Give the index more address space. No transaction of this process may be open."""
        if map_bytes > self._env.info()["map_size"]:
            self._env.set_mapsize(map_bytes)

    def enter(self, slots_in_file: int) -> int:
        """Become a writer, take back what dead ones left, and drop pages beyond the file's end; return how many."""
        assert self._lock is not None
        with self._write(time.monotonic() + _SET_UP_TIMEOUT_S) as (txn, state):
            self._slots.writer, state.next_writer = state.next_writer, state.next_writer + 1
            self._lock.live(self._slots.writer)
            self._slots.reclaim(txn)
            lost = 0
            if slots_in_file < state.high_water:
                for key, raw in list(txn.cursor(self._pages)):
                    with contextlib.suppress(CorruptPage):
                        if decode_record(key, raw).slot >= slots_in_file:
                            self._remove(txn, state, key)
                            lost += 1
            if state.leaked:
                self._repair(txn, state)
            return lost

    # Reading.

    def find(self, keys: Sequence[PageKey]) -> Found:
        """The records of `keys`, in one read transaction."""
        found = Found()
        with self._env.begin() as txn:
            for key in keys:
                record = None
                try:
                    record = self._get(txn, key)
                except CorruptPage:
                    found.damaged.append(key)
                found.records.append(record)
        return found

    def still_there(self, records: Sequence[PageRecord]) -> list[bool]:
        """Which records still describe the same copies; a touch meanwhile does not matter."""
        with self._env.begin() as txn:
            return [
                (txn.get(record.header.key, db=self._pages) or b"")[:HEADER_BYTES] == record.raw_header
                for record in records
            ]

    def scan(self, position: ScanPosition | None = None) -> tuple[list[PageRecord], ScanPosition | None]:
        """Some records, least recently used first, and where to go on; None at the end.

        Ends with what was there when it began: a page used meanwhile is missed, since whoever used it knows it.
        """
        records: list[PageRecord] = []
        with self._env.begin() as txn:
            if position is None:
                position = ScanPosition(0, self._state(txn).clock)
            cursor = txn.cursor(self._order)
            if not cursor.set_range(_STAMP.pack(position.start)):
                return records, None
            for looked, (raw_stamp, key) in enumerate(cursor):
                if len(raw_stamp) != _STAMP.size:  # damage
                    continue
                (stamp,) = _STAMP.unpack(raw_stamp)
                if stamp > position.end:
                    break
                if looked >= SCAN_BATCH:
                    return records, ScanPosition(stamp, position.end)
                with contextlib.suppress(CorruptPage):
                    record = self._get(txn, key)
                    if record is not None and record.stamp == stamp:
                        records.append(record)
        return records, None

    def keys(self) -> list[PageKey]:
        """The keys of all records, also of damaged ones."""
        with self._env.begin() as txn:
            keys = txn.cursor(self._pages).iternext(values=False)
            return [PageKey(key) for key in keys if len(key) == KEY_BYTES]  # nobody asks for any other

    def usage(self) -> dict[str, int]:
        """Slots by state; `slots` is their sum and those never used."""
        with self._env.begin() as txn:
            state = self._state(txn)
            pages = txn.stat(self._pages)["entries"]
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
        orphans: list[Claim] = []
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

    def publish(self, pages: Sequence[Written], failed: Sequence[Claim], *, deadline: float) -> list[bool]:
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
                stamp = state.tick()
                raw = encode_record(
                    page.raw_header,
                    slot=page.claim.slot,
                    stamp=stamp,
                    expires_at=page.expires_at,
                    tokens=page.tokens,
                )
                if txn.put(page.key, raw, overwrite=False, db=self._pages):
                    txn.put(_STAMP.pack(stamp), page.key, db=self._order)
                else:
                    self._slots.free(txn, page.claim.slot)
        return answers

    def abandon(self, claims: Sequence[Claim]) -> None:
        """Remember claims that could not be published; the next `claim` gives them back."""
        self._orphans.extend(claims)

    def touch(self, keys: Sequence[PageKey], expires_at: float, *, now: float, deadline: float) -> list[bool]:
        """Make keys the most recent ones, in this order, and move their deadline if `expires_at` is not 0."""
        answers = []
        with self._write(deadline) as (txn, state):
            for key in keys:
                record = None
                with contextlib.suppress(CorruptPage):
                    record = self._get(txn, key)
                if record is None or record.is_expired(now):
                    answers.append(False)
                    continue
                txn.delete(_STAMP.pack(record.stamp), db=self._order)
                stamp = state.tick()
                raw = encode_record(
                    record.raw_header,
                    slot=record.slot,
                    stamp=stamp,
                    expires_at=expires_at or record.expires_at,
                    tokens=record.tokens,
                )
                txn.put(key, raw, db=self._pages)
                txn.put(_STAMP.pack(stamp), key, db=self._order)
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
        with (
            contextlib.suppress(TierUnavailable, lmdb.MapFullError, lmdb.DiskError),
            self._write(deadline) as (txn, state),
        ):
            for key in damaged:
                with contextlib.suppress(CorruptPage):
                    self._get(txn, key)
                    continue
                self._remove(txn, state, key)
            for record in records:
                if (txn.get(record.header.key, db=self._pages) or b"")[:HEADER_BYTES] == record.raw_header:
                    self._remove(txn, state, record.header.key)

    def close(self) -> None:
        """Close the environment. No other call may be under way."""
        self._env.close()

    # Transactions.

    def _table(self, name: bytes) -> Any:
        if self._lock is None:
            return self._env.open_db(name, create=False)
        with self._lock.writing(time.monotonic() + _SET_UP_TIMEOUT_S):
            return self._env.open_db(name)

    @contextlib.contextmanager
    def _write(self, deadline: float) -> Iterator[tuple[Txn, AllocatorState]]:
        assert self._lock is not None
        with self._lock.writing(deadline), self._env.begin(write=True) as txn:
            state = self._state(txn)
            before = state.encode()
            yield txn, state
            after = state.encode()
            if after != before:
                txn.put(b"state", after, db=self._meta)

    def _state(self, txn: Txn) -> AllocatorState:
        raw = txn.get(b"state", db=self._meta)
        return AllocatorState() if raw is None else AllocatorState.decode(raw)

    # Records.

    def _get(self, txn: Txn, key: bytes) -> PageRecord | None:
        raw = txn.get(key, db=self._pages)
        return None if raw is None else decode_record(key, raw)

    def _is_stored(self, txn: Txn, state: AllocatorState, key: PageKey, now: float, claimed: Claimed) -> bool:
        """True if the page is there to stay; what is expired or damaged is removed first."""
        try:
            record = self._get(txn, key)
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
        raw = txn.pop(key, db=self._pages)
        if raw is None:
            return None
        try:
            slot, stamp = decode_place(key, raw)
        except CorruptPage:
            state.leaked += 1
            return None
        txn.delete(_STAMP.pack(stamp), db=self._order)
        return slot

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
        # Only needed when somebody else stores here too: a planner alone names its victims and knows what fits.
        victims = self._oldest(txn, state, count - len(slots), keep, now) if len(slots) < count else []
        for key in victims:
            self._remove(txn, state, key)
        slots += self._slots.take(txn, state, count - len(slots))
        return slots, len(victims)

    def _oldest(self, txn: Txn, state: AllocatorState, count: int, keep: set[PageKey], now: float) -> list[PageKey]:
        """Up to `count` keys outside `keep`: expired ones first, then the least recently used."""
        expired: list[PageKey] = []
        oldest: list[PageKey] = []
        stale: list[bytes] = []
        damaged: list[PageKey] = []
        for looked, (raw_stamp, raw_key) in enumerate(txn.cursor(self._order)):
            if looked >= count + len(keep) + EVICTION_WINDOW:
                break
            key, record = PageKey(raw_key), None
            try:
                record = self._get(txn, key)
            except CorruptPage:
                damaged.append(key)
            if record is None or _STAMP.pack(record.stamp) != raw_stamp:
                stale.append(raw_stamp)
            elif key not in keep:
                (expired if record.is_expired(now) else oldest).append(key)
        for raw_stamp in stale:
            txn.delete(raw_stamp, db=self._order)
        for key in damaged:
            self._remove(txn, state, key)
        return (expired + oldest)[:count]

    def _repair(self, txn: Txn, state: AllocatorState) -> None:
        """Drop damaged records, free the slots they held, and make the order anew. One pass over the index."""
        used: set[int] = set()
        order: list[tuple[bytes, bytes]] = []
        damaged: list[bytes] = []
        for key, raw in txn.cursor(self._pages):
            record = None
            with contextlib.suppress(CorruptPage):
                record = decode_record(key, raw)
            if record is None:
                damaged.append(key)
            else:
                used.add(record.slot)
                order.append((_STAMP.pack(record.stamp), key))
        for key in damaged:
            txn.delete(key, db=self._pages)
        txn.drop(self._order, delete=False)
        for raw_stamp, key in sorted(order):
            txn.put(raw_stamp, key, db=self._order)
        self._slots.rebuild(txn, state, used)
