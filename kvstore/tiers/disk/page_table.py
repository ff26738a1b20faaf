"""The disk tier's page table: a record for each page, and the order in which pages were used.

    pages    page key      -> record (record.py)
    order    stamp u64 BE  -> page key; least recently used first

A page's record names its stamp, and the order has that stamp once. Where damage has made them disagree the record
counts: an entry of the order that no record answers to is passed over, and removed when room is made.

Inside the caller's transaction; called by DiskIndex only. Slots are the caller's: removing a record tells which slot it
named, and frees none.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvstore.errors import CorruptPage
from kvstore.page import HEADER_BYTES, KEY_BYTES, PageKey
from kvstore.tiers.disk.record import PageRecord, ScannedRecord, decode_place, decode_record, encode_record
from kvstore.tiers.disk.slots import Txn

SCAN_BATCH = 1024  # records per read transaction of a scan: about 5 ms
EVICTION_WINDOW = 64  # how far beyond the least recently used pages an eviction looks for expired ones

_STAMP = struct.Struct(">Q")

R = TypeVar("R", PageRecord, ScannedRecord)


@dataclass(frozen=True, slots=True)
class ScanPosition:
    """Stamps still to be looked at, both ends included."""

    start: int
    end: int


class DiskPageTable:
    """Records by key, and by the time of their last use."""

    def __init__(self, pages: Any, order: Any) -> None:
        """Take the handles of both tables."""
        self._pages = pages
        self._order = order

    # Reading.

    def get(self, txn: Txn, key: bytes) -> PageRecord | None:
        """The record of a key. Raises CorruptPage."""
        raw = txn.get(key, db=self._pages)
        return None if raw is None else decode_record(key, raw)

    def is_same(self, txn: Txn, record: PageRecord) -> bool:
        """True while a record describes the same copy; a touch meanwhile does not matter."""
        return bool((txn.get(record.header.key, db=self._pages) or b"")[:HEADER_BYTES] == record.raw_header)

    def keys(self, txn: Txn) -> list[PageKey]:
        """The keys of all records, also of damaged ones."""
        keys = txn.cursor(self._pages).iternext(values=False)
        return [PageKey(key) for key in keys if len(key) == KEY_BYTES]  # nobody asks for any other

    def count(self, txn: Txn) -> int:
        """How many records there are, damaged ones too."""
        return int(txn.stat(self._pages)["entries"])

    def scan(
        self, txn: Txn, position: ScanPosition, decode: Callable[[bytes, bytes], R]
    ) -> tuple[list[R], ScanPosition | None]:
        """Some records, least recently used first, and where to go on; None at the end."""
        records: list[R] = []
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
            raw = txn.get(key, db=self._pages)
            if raw is None:
                continue
            try:
                record = decode(key, raw)
            except CorruptPage:
                continue
            if record.stamp == stamp:
                records.append(record)
        return records, None

    def beyond(self, txn: Txn, num_slots: int) -> list[bytes]:
        """The keys of pages whose slot is not among the first `num_slots`."""
        keys = []
        for key, raw in txn.cursor(self._pages):
            with contextlib.suppress(CorruptPage):
                if decode_record(key, raw).slot >= num_slots:
                    keys.append(key)
        return keys

    # Writing.

    def add(
        self, txn: Txn, key: PageKey, stamp: int, *, raw_header: bytes, slot: int, expires_at: float, tokens: bytes
    ) -> bool:
        """Make a page visible as the most recent one; False if its key is there already, which then stays."""
        raw = encode_record(raw_header, slot=slot, stamp=stamp, expires_at=expires_at, tokens=tokens)
        if not txn.put(key, raw, overwrite=False, db=self._pages):
            return False
        txn.put(_STAMP.pack(stamp), key, db=self._order)
        return True

    def touch(self, txn: Txn, key: PageKey, record: PageRecord, stamp: int, expires_at: float) -> None:
        """Make a page the most recent one; `expires_at` 0 leaves its deadline."""
        txn.delete(_STAMP.pack(record.stamp), db=self._order)
        raw = encode_record(
            record.raw_header,
            slot=record.slot,
            stamp=stamp,
            expires_at=expires_at or record.expires_at,
            tokens=record.tokens,
        )
        txn.put(key, raw, db=self._pages)
        txn.put(_STAMP.pack(stamp), key, db=self._order)

    def pop(self, txn: Txn, key: bytes) -> int | None:
        """Forget a page; the slot it named, None if it was not there.

        Raises CorruptPage, with the record gone all the same, if it cannot be trusted to name one.
        """
        raw = txn.pop(key, db=self._pages)
        if raw is None:
            return None
        slot, stamp = decode_place(key, raw)
        txn.delete(_STAMP.pack(stamp), db=self._order)
        return slot

    def oldest(self, txn: Txn, count: int, keep: set[PageKey], now: float) -> tuple[list[PageKey], list[PageKey]]:
        """Up to `count` keys outside `keep`, expired ones first, then the least recently used; and damaged ones met.

        Removes what it meets in the order that no record answers to.
        """
        expired: list[PageKey] = []
        oldest: list[PageKey] = []
        stale: list[bytes] = []
        damaged: list[PageKey] = []
        for looked, (raw_stamp, raw_key) in enumerate(txn.cursor(self._order)):
            if looked >= count + len(keep) + EVICTION_WINDOW:
                break
            key, record = PageKey(raw_key), None
            try:
                record = self.get(txn, key)
            except CorruptPage:
                damaged.append(key)
            if record is None or _STAMP.pack(record.stamp) != raw_stamp:
                stale.append(raw_stamp)
            elif key not in keep:
                (expired if record.is_expired(now) else oldest).append(key)
        for raw_stamp in stale:
            txn.delete(raw_stamp, db=self._order)
        return (expired + oldest)[:count], damaged

    def rebuild(self, txn: Txn) -> set[int]:
        """Drop damaged records and make the order anew; the slots that are left. One pass over the table."""
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
        return used
