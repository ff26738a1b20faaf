"""The disk tier's slot allocator: two tables of the index and a few counters, inside the caller's write transaction.

    free     slot u32 BE -> nothing; slots that were used and given back
    writing  slot u32 BE -> generation u64, writer u64 (LE): handed out, not yet published

A slot below the high water mark is either in one of these or named by a page's record. Slots above were never used, so
a new directory of a million slots starts with empty tables. Called by DiskIndex only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvstore.tiers.disk.record import decode_checked, encode_checked

_SLOT = struct.Struct(">I")
_WRITING = struct.Struct("<QQ")
_STATE = struct.Struct("<QQIII")
_MAX_WRITER = 1 << 62  # above lies no lock byte; only damage makes such a number

Txn = Any  # an lmdb.Transaction; its own types do not know that values are bytes unless buffers are asked for


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot handed out for writing. `generation` goes into the page header."""

    slot: int
    generation: int


@dataclass(slots=True)
class AllocatorState:
    """The counters, read and written back in every write transaction.

    clock:       source of stamps and generations; only grows.
    next_writer: number of the next process that opens the directory.
    num_slots:   slots of the slab file.
    high_water:  slots that were ever used.
    leaked:      records that were too damaged to name their slot; `rebuild` finds those slots again.
    """

    clock: int = 0
    next_writer: int = 1
    num_slots: int = 0
    high_water: int = 0
    leaked: int = 0

    @classmethod
    def decode(cls, raw: bytes) -> AllocatorState:
        """Raises CorruptPage."""
        return cls(*_STATE.unpack(decode_checked(raw)))

    def encode(self) -> bytes:
        """The stored form, with a checksum."""
        return encode_checked(_STATE.pack(self.clock, self.next_writer, self.num_slots, self.high_water, self.leaked))

    def tick(self) -> int:
        """The next stamp or generation."""
        self.clock += 1
        return self.clock


class SlotAllocator:
    """Hands slots out and takes them back. `writer` is this process's number, 0 until it has one."""

    def __init__(self, free: Any, writing: Any, is_alive: Callable[[int], bool]) -> None:
        """Take the handles of both tables and the way to ask whether another writer still lives."""
        self.writer = 0
        self._free = free
        self._writing = writing
        self._is_alive = is_alive

    def take(self, txn: Txn, state: AllocatorState, count: int) -> list[int]:
        """Up to `count` slots that nobody has: given back ones first, then fresh ones."""
        slots: list[int] = []
        with txn.cursor(self._free) as cursor:
            while len(slots) < count and cursor.first():
                raw = cursor.key()
                cursor.delete()
                if len(raw) == _SLOT.size and _SLOT.unpack(raw)[0] < state.high_water:  # else damage
                    slots.append(_SLOT.unpack(raw)[0])
        fresh = min(count - len(slots), state.num_slots - state.high_water)
        slots.extend(range(state.high_water, state.high_water + fresh))
        state.high_water += fresh
        return slots

    def claim(self, txn: Txn, state: AllocatorState, slot: int) -> Reservation:
        """Mark a taken slot as being written by this process."""
        claim = Reservation(slot, state.tick())
        txn.put(_SLOT.pack(slot), _WRITING.pack(claim.generation, self.writer), db=self._writing)
        return claim

    def settle(self, txn: Txn, claim: Reservation) -> bool:
        """End a claim, its slot now belonging to a record; False if it is no longer ours."""
        raw = txn.get(_SLOT.pack(claim.slot), db=self._writing)
        if raw != _WRITING.pack(claim.generation, self.writer):
            return False
        txn.delete(_SLOT.pack(claim.slot), db=self._writing)
        return True

    def give_back(self, txn: Txn, claim: Reservation) -> None:
        """End a claim and free its slot, if it is still ours."""
        if self.settle(txn, claim):
            self.free(txn, claim.slot)

    def free(self, txn: Txn, slot: int) -> None:
        """Take a slot back that no record names any more."""
        txn.put(_SLOT.pack(slot), b"", db=self._free)

    def reclaim(self, txn: Txn) -> int:
        """Free what writers that died were writing; return how many slots."""
        alive: dict[int, bool] = {self.writer: True}
        dead: list[bytes] = []
        for raw_slot, raw in txn.cursor(self._writing):
            writer = _WRITING.unpack(raw)[1] if len(raw) == _WRITING.size else _MAX_WRITER
            if writer not in alive:
                alive[writer] = writer < _MAX_WRITER and self._is_alive(writer)
            if not alive[writer]:
                dead.append(raw_slot)
        for raw_slot in dead:
            txn.delete(raw_slot, db=self._writing)
            txn.put(raw_slot, b"", db=self._free)
        return len(dead)

    def rebuild(self, txn: Txn, state: AllocatorState, used: Iterable[int]) -> None:
        """Free every slot that neither a record names (`used`) nor somebody is writing."""
        taken = {raw for raw, _ in txn.cursor(self._writing)}
        taken.update(_SLOT.pack(slot) for slot in used)
        txn.drop(self._free, delete=False)
        for raw in map(_SLOT.pack, range(state.high_water)):
            if raw not in taken:
                txn.put(raw, b"", db=self._free)
        state.leaked = 0

    def counts(self, txn: Txn, state: AllocatorState) -> tuple[int, int]:
        """Slots free (also those never used) and slots being written."""
        free, writing = (int(txn.stat(table)["entries"]) for table in (self._free, self._writing))
        return free + state.num_slots - state.high_water, writing
