"""The disk tier's index and slot allocator: small records in LMDB, shared by all processes on one directory.

    pages    page key             -> record (disk_record.py)
    order    stamp u64 BE         -> page key; least recently used first
    free     slot u32 BE          -> nothing; slots that were used and given back
    writing  slot u32 BE          -> generation u64, writer u64 (LE): handed out, not yet published
    meta     "geometry", "state"  -> checked values: what never changes, and the allocator's counters

A slot below the high water mark is in exactly one of pages, free and writing. To store a page a caller claims a slot
(one short transaction), writes the bytes outside any transaction, and publishes (another one). Whoever dies between
leaves a `writing` entry of a writer that no longer lives; it is taken back when room is needed. Stamps and generations
come from one counter that only grows, so a slot that was given away and filled again is told from what it was.

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
from kvstore.page import PageKey
from kvstore.tiers.directory_lock import DirectoryLock
from kvstore.tiers.disk_record import (
    PageRecord,
    decode_checked,
    decode_record,
    encode_checked,
    encode_record,
)

DISK_FORMAT_VERSION = 1
SCAN_BATCH = 1024  # records per read transaction of a scan: about 5 ms
EVICTION_WINDOW = 64  # how far beyond the least recently used pages an eviction looks for expired ones

_SLOT = struct.Struct(">I")
_STAMP = struct.Struct(">Q")
_WRITING = struct.Struct("<QQ")
_STATE = struct.Struct("<QQIII")
_OPEN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a directory is made for; pages of another layout are never put into it."""

    layout: str
    slot_bytes: int
    version: int = DISK_FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot handed out for writing. `generation` goes into the page header."""

    slot: int
    generation: int


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


@dataclass(slots=True)
class _State:
    """The allocator's counters. leaked: slots whose record was damaged, so that nothing names them any more."""

    clock: int = 1
    next_writer: int = 1
    num_slots: int = 0
    high_water: int = 0
    leaked: int = 0

    def encode(self) -> bytes:
        return encode_checked(_STATE.pack(self.clock, self.next_writer, self.num_slots, self.high_water, self.leaked))

    def tick(self) -> int:
        self.clock += 1
        return self.clock


class DiskIndex:
    """Records and slots of one directory. See the head of the module for the tables."""

    def __init__(self, env: lmdb.Environment, lock: DirectoryLock | None) -> None:
        """Take an open environment; `lock` is None for reading only.

        Raises CorruptPage or lmdb.Error if it is not an index.
        """
        self._env = env
        self._lock = lock
        self._writer = 0
        self._orphans: list[Claim] = []  # claims that could be neither published nor freed
        self._pages = self._table(b"pages")
        self._order = self._table(b"order")
        self._free = self._table(b"free")
        self._writing = self._table(b"writing")
        self._meta = self._table(b"meta")

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
        with self._write(time.monotonic() + _OPEN_TIMEOUT_S) as (txn, state):
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
        with self._write(time.monotonic() + _OPEN_TIMEOUT_S) as (txn, state):
            self._writer, state.next_writer = state.next_writer, state.next_writer + 1
            self._lock.live(self._writer)
            self._reclaim(txn)
            lost = 0
            if slots_in_file < state.high_water:
                for key, raw in list(txn.cursor(self._pages)):
                    with contextlib.suppress(CorruptPage):
                        if decode_record(key, raw).slot >= slots_in_file:
                            self._remove(txn, state, key)
                            lost += 1
            if state.leaked:
                self._rebuild(txn, state)
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
                (stamp,) = _STAMP.unpack(raw_stamp)
                if stamp > position.end:
                    break
                if looked == SCAN_BATCH:
                    return records, ScanPosition(stamp, position.end)
                with contextlib.suppress(CorruptPage):
                    record = self._get(txn, key)
                    if record is not None and record.stamp == stamp:
                        records.append(record)
        return records, None

    def keys(self) -> list[PageKey]:
        """The keys of all records, also of damaged ones."""
        with self._env.begin() as txn:
            return [PageKey(key) for key in txn.cursor(self._pages).iternext(values=False)]

    def usage(self) -> dict[str, int]:
        """Slots by state; `slots` is their sum and those never used."""
        with self._env.begin() as txn:
            state = self._state(txn)
            pages, free, writing = (txn.stat(db)["entries"] for db in (self._pages, self._free, self._writing))
        return {
            "slots": state.num_slots,
            "pages": pages,
            "writing": writing,
            "free": free + state.num_slots - state.high_water,
            "leaked": state.high_water - pages - free - writing,
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
                    self._give_back(txn, claim)
                for key in evict:
                    self._remove(txn, state, key)
                claimed.answers.extend(self._is_stored(txn, state, key, now, claimed) for key in keys)
                missing = [position for position, stored in enumerate(claimed.answers) if not stored]
                slots, claimed.evicted = self._take(txn, state, len(missing), set(keys), now)
                for position, slot in zip(missing, slots, strict=False):
                    claim = Claim(slot, state.tick())
                    txn.put(_SLOT.pack(slot), _WRITING.pack(claim.generation, self._writer), db=self._writing)
                    claimed.answers[position] = claim
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
                self._give_back(txn, claim)
            for page in pages:
                if not self._is_ours(txn, page.claim):
                    answers.append(False)
                    continue
                if txn.get(page.key, db=self._pages) is not None:
                    self._give_back(txn, page.claim)
                    answers.append(True)
                    continue
                txn.delete(_SLOT.pack(page.claim.slot), db=self._writing)
                self._put(txn, state, page.key, page.raw_header, page.claim.slot, page.expires_at, page.tokens)
                answers.append(True)
        return answers

    def abandon(self, claims: Sequence[Claim]) -> None:
        """Remember claims that could not be published; the next `claim` gives them back."""
        self._orphans.extend(claims)

    def touch(self, keys: Sequence[PageKey], expires_at: float, *, now: float, deadline: float) -> list[bool]:
        """Make keys the most recent ones, in this order, and move their deadline if `expires_at` is not 0."""
        answers = []
        with self._write(deadline) as (txn, state):
            for key in keys:
                try:
                    record = self._get(txn, key)
                except CorruptPage:
                    record = None
                if record is None or record.is_expired(now):
                    answers.append(False)
                    continue
                txn.delete(_STAMP.pack(record.stamp), db=self._order)
                until = expires_at or record.expires_at
                self._put(txn, state, key, record.raw_header, record.slot, until, record.tokens)
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
                with contextlib.suppress(CorruptPage):
                    if record.is_same_copy(self._get(txn, record.header.key)):
                        self._remove(txn, state, record.header.key)

    def close(self) -> None:
        """Close the environment. No other call may be under way."""
        self._env.close()

    # Transactions.

    def _table(self, name: bytes) -> Any:
        if self._lock is None:
            return self._env.open_db(name, create=False)
        with self._lock.writing(time.monotonic() + _OPEN_TIMEOUT_S):
            return self._env.open_db(name)

    @contextlib.contextmanager
    def _write(self, deadline: float) -> Iterator[tuple[lmdb.Transaction, _State]]:
        assert self._lock is not None
        with self._lock.writing(deadline), self._env.begin(write=True) as txn:
            state = self._state(txn)
            before = state.encode()
            yield txn, state
            after = state.encode()
            if after != before:
                txn.put(b"state", after, db=self._meta)

    def _state(self, txn: lmdb.Transaction) -> _State:
        raw = txn.get(b"state", db=self._meta)
        return _State() if raw is None else _State(*_STATE.unpack(decode_checked(raw)))

    # Records.

    def _get(self, txn: lmdb.Transaction, key: bytes) -> PageRecord | None:
        raw = txn.get(key, db=self._pages)
        return None if raw is None else decode_record(key, raw)

    def _is_stored(self, txn: lmdb.Transaction, state: _State, key: PageKey, now: float, claimed: Claimed) -> bool:
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

    def _put(
        self,
        txn: lmdb.Transaction,
        state: _State,
        key: PageKey,
        raw_header: bytes,
        slot: int,
        expires_at: float,
        tokens: bytes,
    ) -> None:
        stamp = state.tick()
        raw = encode_record(raw_header, slot=slot, stamp=stamp, expires_at=expires_at, tokens=tokens)
        txn.put(key, raw, db=self._pages)
        txn.put(_STAMP.pack(stamp), key, db=self._order)

    def _remove(self, txn: lmdb.Transaction, state: _State, key: bytes) -> None:
        raw = txn.pop(key, db=self._pages)
        if raw is None:
            return
        try:
            record = decode_record(key, raw)
        except CorruptPage:
            state.leaked += 1  # a slot number that cannot be trusted is not handed out
            return
        txn.delete(_STAMP.pack(record.stamp), db=self._order)
        txn.put(_SLOT.pack(record.slot), b"", db=self._free)

    # Slots.

    def _take(
        self, txn: lmdb.Transaction, state: _State, count: int, keep: set[PageKey], now: float
    ) -> tuple[list[int], int]:
        """Up to `count` slots, and how many pages were evicted for them. Least disturbing source first."""
        slots = self._take_free(txn, state, count)
        if len(slots) < count and self._reclaim(txn):
            slots += self._take_free(txn, state, count - len(slots))
        if len(slots) < count and state.leaked:
            self._rebuild(txn, state)
            slots += self._take_free(txn, state, count - len(slots))
        evicted = 0
        if len(slots) < count:
            # Only when somebody else stores here too: a planner alone names its victims and knows what fits.
            for key in self._oldest(txn, count - len(slots), keep, now):
                self._remove(txn, state, key)
                evicted += 1
            slots += self._take_free(txn, state, count - len(slots))
        return slots, evicted

    def _take_free(self, txn: lmdb.Transaction, state: _State, count: int) -> list[int]:
        slots: list[int] = []
        with txn.cursor(self._free) as cursor:
            while len(slots) < count and cursor.first():
                raw = cursor.key()
                cursor.delete()
                slot = _SLOT.unpack(raw)[0] if len(raw) == _SLOT.size else state.num_slots
                if slot < state.high_water:
                    slots.append(slot)
        fresh = min(count - len(slots), state.num_slots - state.high_water)
        slots.extend(range(state.high_water, state.high_water + fresh))
        state.high_water += fresh
        return slots

    def _oldest(self, txn: lmdb.Transaction, count: int, keep: set[PageKey], now: float) -> list[PageKey]:
        """Up to `count` keys outside `keep`: expired ones first, then the least recently used."""
        expired: list[PageKey] = []
        oldest: list[PageKey] = []
        stale: list[bytes] = []
        for looked, (raw_stamp, raw_key) in enumerate(txn.cursor(self._order)):
            if looked >= count + len(keep) + EVICTION_WINDOW:
                break
            key = PageKey(raw_key)
            try:
                record = self._get(txn, key)
            except CorruptPage:
                oldest.append(key)
                continue
            if record is None or _STAMP.pack(record.stamp) != raw_stamp:
                stale.append(raw_stamp)
            elif key not in keep:
                (expired if record.is_expired(now) else oldest).append(key)
        for raw_stamp in stale:
            txn.delete(raw_stamp, db=self._order)
        return (expired + oldest)[:count]

    def _is_ours(self, txn: lmdb.Transaction, claim: Claim) -> bool:
        raw = txn.get(_SLOT.pack(claim.slot), db=self._writing)
        return bool(raw == _WRITING.pack(claim.generation, self._writer))

    def _give_back(self, txn: lmdb.Transaction, claim: Claim) -> None:
        if self._is_ours(txn, claim):
            txn.delete(_SLOT.pack(claim.slot), db=self._writing)
            txn.put(_SLOT.pack(claim.slot), b"", db=self._free)

    def _reclaim(self, txn: lmdb.Transaction) -> int:
        """Give back the slots of writers that died; return how many."""
        assert self._lock is not None
        alive: dict[int, bool] = {self._writer: True}
        dead: list[bytes] = []
        for raw_slot, raw in txn.cursor(self._writing):
            writer = _WRITING.unpack(raw)[1] if len(raw) == _WRITING.size else 0
            if writer not in alive:
                alive[writer] = writer < 1 << 62 and self._lock.is_alive(writer)
            if not alive[writer]:
                dead.append(raw_slot)
        for raw_slot in dead:
            txn.delete(raw_slot, db=self._writing)
            txn.put(raw_slot, b"", db=self._free)
        return len(dead)

    def _rebuild(self, txn: lmdb.Transaction, state: _State) -> None:
        """Work out from records and claims which slots are free. One pass over the index; only after damage."""
        used, damaged = set(), []
        for key, raw in txn.cursor(self._pages):
            try:
                used.add(decode_record(key, raw).slot)
            except CorruptPage:
                damaged.append(key)
        for key in damaged:
            txn.delete(key, db=self._pages)
        used.update(_SLOT.unpack(raw)[0] for raw, _ in txn.cursor(self._writing) if len(raw) == _SLOT.size)
        txn.drop(self._free, delete=False)
        for slot in range(state.high_water):
            if slot not in used:
                txn.put(_SLOT.pack(slot), b"", db=self._free)
        state.leaked = 0
