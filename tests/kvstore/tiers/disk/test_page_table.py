from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from kvstore.errors import CorruptPage
from kvstore.page import PageKey, PageMeta, encode_header
from kvstore.testing.pages import key_of
from kvstore.tiers.disk.page_table import DiskPageTable, ScanPosition
from kvstore.tiers.disk.record import decode_scanned

ALL = ScanPosition(0, 1 << 32)


class Tables:
    """Both tables in an LMDB environment of their own."""

    def __init__(self, env: lmdb.Environment) -> None:
        self.env = env
        self.pages, self.order = env.open_db(b"pages"), env.open_db(b"order")
        self.table = DiskPageTable(self.pages, self.order)

    def add(self, txn: Any, name: str, stamp: int, *, slot: int = 0, expires_at: float = 0.0) -> bool:
        header = encode_header(key_of(name), PageMeta(1), memoryview(b"x"), created_at=0.0, generation=stamp)
        return self.table.add(txn, key_of(name), stamp, raw_header=header, slot=slot, expires_at=expires_at, tokens=b"")

    def scanned(self, txn: Any) -> list[PageKey]:
        return [record.key for record in self.table.scan(txn, ALL, decode_scanned)[0]]


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    with lmdb.open(str(tmp_path), max_dbs=2, map_size=1 << 20) as env:
        yield Tables(env)


def test_pages_are_scanned_in_the_order_of_their_use(tables: Tables) -> None:
    with tables.env.begin(write=True) as txn:
        for stamp, name in enumerate("abc", start=1):
            assert tables.add(txn, name, stamp)
        record = tables.table.get(txn, key_of("a"))
        assert record is not None
        tables.table.touch(txn, key_of("a"), record, 9, 0.0)

        assert tables.scanned(txn) == [key_of("b"), key_of("c"), key_of("a")]
        assert tables.table.is_same(txn, record)


def test_the_first_page_of_a_key_stays(tables: Tables) -> None:
    with tables.env.begin(write=True) as txn:
        assert tables.add(txn, "a", 1, slot=5)
        assert not tables.add(txn, "a", 2, slot=6)

        assert tables.scanned(txn) == [key_of("a")]
        assert tables.table.pop(txn, key_of("a")) == 5
        assert tables.table.pop(txn, key_of("a")) is None
        assert tables.scanned(txn) == []


def test_expired_pages_are_older_than_any_other(tables: Tables) -> None:
    with tables.env.begin(write=True) as txn:
        for stamp, name in enumerate("abcd", start=1):
            tables.add(txn, name, stamp, expires_at=10.0 if name == "c" else 0.0)

        oldest, damaged = tables.table.oldest(txn, 2, {key_of("a")}, 11.0)

        assert oldest == [key_of("c"), key_of("b")]
        assert damaged == []


def test_an_entry_of_the_order_that_no_record_answers_to_is_passed_over_and_removed(tables: Tables) -> None:
    with tables.env.begin(write=True) as txn:
        tables.add(txn, "a", 2)
        txn.put((1).to_bytes(8, "big"), key_of("a"), db=tables.order)  # a stamp that the record does not have
        txn.put((3).to_bytes(8, "big"), key_of("gone"), db=tables.order)
        assert tables.scanned(txn) == [key_of("a")]

        assert tables.table.oldest(txn, 4, set(), 0.0) == ([key_of("a")], [])

        assert txn.stat(tables.order)["entries"] == 1


def test_a_damaged_record_names_no_slot_and_is_dropped_by_a_rebuild(tables: Tables) -> None:
    with tables.env.begin(write=True) as txn:
        for stamp, name in enumerate("abc", start=1):
            tables.add(txn, name, stamp, slot=stamp)
        for name in "ab":
            raw = bytearray(txn.get(key_of(name), db=tables.pages) or b"")
            raw[-1] ^= 1
            txn.put(key_of(name), bytes(raw), db=tables.pages)

        with pytest.raises(CorruptPage):
            tables.table.pop(txn, key_of("a"))
        assert tables.table.count(txn) == 2
        assert tables.table.rebuild(txn) == {3}

        assert tables.table.keys(txn) == [key_of("c")]
        assert txn.stat(tables.order)["entries"] == 1
