"""The disk tier keeps the tier contract, with and without O_DIRECT, and what it adds: sharing, reopening, growing."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from kvstore.errors import ConfigError, LayoutMismatch, RequestError, TierUnavailable
from kvstore.page import PageKey, PageMeta
from kvstore.testing.contracts.tier import TierContract
from kvstore.testing.pages import TIMEOUT_S, FakeClock, fetch, filled, key_of, keys_of, payload, slots, store
from kvstore.tiers.base import Tier
from kvstore.tiers.disk.directory_lock import DirectoryLock
from kvstore.tiers.disk.index_map import IndexMapFull
from kvstore.tiers.disk.meta import DISK_FORMAT_VERSION, LMDB_LOCKS_VERSION
from kvstore.tiers.disk.report import describe, verify
from kvstore.tiers.disk.tier import DiskTier
from tests.helpers.disk import (
    SLOT_BYTES,
    check_slots,
    flip_slab_bit,
    index_of,
    open_disk,
    put_raw_record,
    raw_record,
    record_of,
    stored_keys,
)
from tests.helpers.stores import open_small

ROOT = Path(__file__).parents[4]


class TestDiskTier(TierContract):
    slot_bytes = SLOT_BYTES
    direct = True

    @pytest.fixture
    def tier(self, clock: FakeClock, tmp_path: Path) -> Iterator[Tier]:
        with closing(open_disk(tmp_path, self.capacity, direct=self.direct, now=clock)) as tier:
            yield tier
            if not tier._is_closed:
                check_slots_after_damage(tier)

    def regions(self, tier: Tier, key: PageKey) -> dict[str, int]:
        assert isinstance(tier, DiskTier)
        return {"record": len(raw_record(tier, key)), "slab": record_of(tier, key).header.stored_bytes}

    def flip_bit(self, tier: Tier, key: PageKey, region: str, byte: int, bit: int) -> None:
        assert isinstance(tier, DiskTier)
        if region == "slab":
            flip_slab_bit(tier, key, byte, bit)
        else:
            raw = bytearray(raw_record(tier, key))
            raw[byte] ^= 1 << bit
            put_raw_record(tier, key, bytes(raw))


class TestDiskTierThroughThePageCache(TestDiskTier):
    direct = False


def check_slots_after_damage(tier: DiskTier) -> None:
    """Damaged records leave slots that nobody names and stamps of nothing; a repair finds all of them."""
    index = index_of(tier)
    with index._write(time.monotonic() + TIMEOUT_S) as (txn, state):
        if state.leaked:
            index._repair(txn, state)
    check_slots(tier)


class TestReopening:
    def test_every_page_is_there_in_the_same_order_of_use(self, tmp_path: Path) -> None:
        keys = keys_of("page", 6)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)
            tier.touch([keys[2]], expires_at=0.0, timeout_s=TIMEOUT_S)
            order = stored_keys(tier)

        with closing(open_disk(tmp_path)) as tier:
            assert stored_keys(tier) == order == [*keys[:2], *keys[3:], keys[2]]
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            check_slots(tier)

    def test_a_larger_capacity_grows_the_directory_and_keeps_its_pages(self, tmp_path: Path) -> None:
        keys = keys_of("page", 8)
        with closing(open_disk(tmp_path, 4)) as tier:
            store(tier, keys[:4], SLOT_BYTES)

        with closing(open_disk(tmp_path, 8)) as tier:
            assert tier.capacity_pages == 8
            assert store(tier, keys[4:], SLOT_BYTES) == [True] * 4
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            assert tier.counters.fallback_evictions == 0

    def test_a_smaller_capacity_is_refused_and_loses_nothing(self, tmp_path: Path) -> None:
        keys = keys_of("page", 8)
        with closing(open_disk(tmp_path, 8)) as tier:
            store(tier, keys, SLOT_BYTES)

        with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {4 * SLOT_BYTES}.*{8 * SLOT_BYTES} bytes"):
            open_disk(tmp_path, 4)

        with closing(open_disk(tmp_path, 8)) as tier:
            assert stored_keys(tier) == keys

    @pytest.mark.parametrize(("layout", "slot_bytes"), [("other", SLOT_BYTES), ("layout", 2 * SLOT_BYTES)])
    def test_another_layout_is_refused_and_loses_nothing(self, tmp_path: Path, layout: str, slot_bytes: int) -> None:
        keys = keys_of("page", 3)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)

        with pytest.raises(LayoutMismatch, match="directory of its own"):
            DiskTier.open(tmp_path, layout, slot_bytes, 8 * slot_bytes)

        with closing(open_disk(tmp_path)) as tier:
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]

    def test_a_newer_format_is_refused_and_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys_of("page", 1), SLOT_BYTES)

        with monkeypatch.context() as patch:
            patch.setattr("kvstore.tiers.disk.meta.DISK_FORMAT_VERSION", 0)
            with pytest.raises(LayoutMismatch, match="format version 2; this release reads 0"):
                open_disk(tmp_path)

        with closing(open_disk(tmp_path)) as tier:
            assert stored_keys(tier) == keys_of("page", 1)

    def test_a_directory_of_an_older_build_keeps_its_pages_and_is_closed_to_that_build(self, tmp_path: Path) -> None:
        keys = keys_of("page", 4)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)
            write_version(tier, LMDB_LOCKS_VERSION)

        with closing(open_disk(tmp_path, read_only=True)) as tier:
            assert stored_keys(tier) == keys
            assert version_of(tier) == LMDB_LOCKS_VERSION
        with closing(open_disk(tmp_path)) as tier:
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            assert version_of(tier) == DISK_FORMAT_VERSION  # which such a build refuses

    def test_a_directory_that_an_older_build_has_open_is_refused(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys_of("page", 1), SLOT_BYTES)
            write_version(tier, LMDB_LOCKS_VERSION)
        child = run_child(HOLD_AS_A_USER, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"

        for read_only in (False, True):
            with pytest.raises(ConfigError, match="older release"):
                open_disk(tmp_path, read_only=read_only)

        child.kill()
        child.wait()
        child.stdout.close()
        with closing(open_disk(tmp_path)) as tier:
            assert stored_keys(tier) == keys_of("page", 1)

    def test_buffered_and_direct_tiers_read_each_other(self, tmp_path: Path) -> None:
        keys = keys_of("page", 4)
        for direct, half in ((False, keys[:2]), (True, keys[2:])):
            with closing(open_disk(tmp_path, direct=direct)) as tier:
                store(tier, half, SLOT_BYTES)
                assert tier.is_direct <= direct

        for direct in (True, False):
            with closing(open_disk(tmp_path, direct=direct)) as tier:
                assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]


class TestBadConfiguration:
    def test_a_capacity_below_one_page_names_the_field(self, tmp_path: Path) -> None:
        for capacity in (0, SLOT_BYTES - 1):
            with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {capacity}"):
                DiskTier.open(tmp_path, "layout", SLOT_BYTES, capacity)

    def test_slots_that_do_not_suit_direct_io_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="slot_bytes is 1000; it must be a positive multiple of 4096"):
            DiskTier.open(tmp_path, "layout", 1000, 10_000)

    def test_a_path_that_is_a_file_names_the_field(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(ConfigError, match=r"disk\.path is .*file"):
            open_disk(tmp_path / "file")

    def test_a_capacity_beyond_the_disk_names_the_field_and_what_fits(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"disk\.capacity_bytes is \d+, but .* only \d+ bytes for it: set it to at"
        ):
            DiskTier.open(tmp_path, "layout", SLOT_BYTES, 1 << 56)

        with closing(open_disk(tmp_path)) as tier:  # the refusal left nothing in the way
            assert store(tier, keys_of("page", 1), SLOT_BYTES) == [True]

    def test_growing_beyond_the_disk_is_refused_and_loses_nothing(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys_of("page", 3), SLOT_BYTES)

        with pytest.raises(ConfigError, match=r"disk\.capacity_bytes"):
            DiskTier.open(tmp_path, "layout", SLOT_BYTES, 1 << 56)

        with closing(open_disk(tmp_path)) as tier:
            assert stored_keys(tier) == keys_of("page", 3)

    def test_a_page_longer_than_a_slot_is_misuse(self, tmp_path: Path) -> None:
        views = slots(1, 2 * SLOT_BYTES)
        with closing(open_disk(tmp_path)) as tier:  # noqa: SIM117
            with pytest.raises(RequestError, match="does not fit slots"):
                tier.write_from([key_of("page")], views, [PageMeta(SLOT_BYTES + 1)], timeout_s=TIMEOUT_S)


def test_only_the_owner_can_read_what_is_stored(tmp_path: Path) -> None:
    open_disk(tmp_path / "cache").close()

    paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert len(paths) == 5
    assert all(path.stat().st_mode & 0o077 == 0 for path in paths)


class TestReadingOnly:
    def test_pages_are_read_and_nothing_is_written(self, tmp_path: Path) -> None:
        keys = keys_of("page", 2)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)

        with closing(DiskTier.open(tmp_path, "layout", SLOT_BYTES, 0, read_only=True)) as tier:
            assert fetch(tier, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]
            assert store(tier, [key_of("new")], SLOT_BYTES) == [False]
            assert tier.touch([keys[0], key_of("new")], expires_at=5.0, timeout_s=TIMEOUT_S) == [True, False]
            tier.delete(keys, timeout_s=TIMEOUT_S)
            tier.ping(timeout_s=TIMEOUT_S)
            assert stored_keys(tier) == keys

    def test_a_corrupt_page_is_a_miss_and_stays(self, tmp_path: Path) -> None:
        key = key_of("page")
        with closing(open_disk(tmp_path)) as tier:
            store(tier, [key], SLOT_BYTES)
            flip_slab_bit(tier, key, 5, 5)

        with closing(DiskTier.open(tmp_path, "layout", SLOT_BYTES, 0, read_only=True)) as tier:
            assert fetch(tier, [key], SLOT_BYTES) == [None]
            assert tier.counters.corrupt_pages == 1
            assert tier.contains([key], timeout_s=TIMEOUT_S) == [True]

    def test_a_place_without_pages_is_refused_and_stays_empty(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"disk\.path is .*no page directory"):
            DiskTier.open(tmp_path, "layout", SLOT_BYTES, 0, read_only=True)

        assert list(tmp_path.iterdir()) == []


class TestSharingInOneProcess:
    def test_two_tiers_see_each_others_pages(self, tmp_path: Path) -> None:
        keys = keys_of("page", 2)
        with closing(open_disk(tmp_path)) as one, closing(open_disk(tmp_path)) as two:
            store(one, keys[:1], SLOT_BYTES)
            store(two, keys[1:], SLOT_BYTES)

            assert fetch(one, keys, SLOT_BYTES) == fetch(two, keys, SLOT_BYTES)
            one.close()
            assert fetch(two, keys, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in keys]

    def test_a_second_tier_may_grow_what_the_first_uses(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 2)) as one, closing(open_disk(tmp_path, 6)) as two:
            assert store(two, keys_of("page", 6), SLOT_BYTES) == [True] * 6
            assert len(stored_keys(one)) == 6

    def test_a_second_tier_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 4)) as tier:
            with pytest.raises(LayoutMismatch):
                open_disk(tmp_path, 4, layout="other")
            with pytest.raises(ConfigError, match="does not shrink"):
                open_disk(tmp_path, 2)

            assert store(tier, keys_of("page", 4), SLOT_BYTES) == [True] * 4

    def test_a_writer_beside_a_reader_is_refused(self, tmp_path: Path) -> None:
        open_disk(tmp_path).close()
        with (
            closing(DiskTier.open(tmp_path, "layout", SLOT_BYTES, 0, read_only=True)),
            pytest.raises(ConfigError, match="for reading only"),
        ):
            open_disk(tmp_path)

    def test_all_files_are_closed_with_the_last_tier(self, tmp_path: Path) -> None:
        before = sorted(os.listdir("/proc/self/fd"))

        one, two = open_disk(tmp_path), open_disk(tmp_path)
        one.close()
        two.close()

        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_a_forked_child_is_told_and_the_parent_works_on(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys_of("page", 1), SLOT_BYTES)
            pid = os.fork()
            if pid == 0:
                told = is_told(lambda: tier.ping(timeout_s=1)) + is_told(lambda: open_disk(tmp_path))
                tier.close()
                os._exit(told)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2

            assert store(tier, keys_of("page", 2), SLOT_BYTES) == [True, True]
            assert fetch(tier, keys_of("page", 1), SLOT_BYTES) == [payload(keys_of("page", 1)[0], SLOT_BYTES)]


def is_told(use: Callable[[], object]) -> bool:
    try:
        use()
    except TierUnavailable:
        return True
    return False


class TestRoom:
    def test_a_full_directory_gives_up_expired_pages_first_then_the_least_recently_used(self, tmp_path: Path) -> None:
        clock = FakeClock()
        keys = keys_of("page", 4)
        with closing(open_disk(tmp_path, 4, now=clock)) as tier:
            for key in keys:
                short_lived = key == keys[2]
                meta = PageMeta(SLOT_BYTES, expires_at=clock() + 10 if short_lived else 0.0)
                store(tier, [key], SLOT_BYTES, meta=meta)
            clock.advance(11)

            assert store(tier, [key_of("a")], SLOT_BYTES) == [True]
            assert stored_keys(tier) == [keys[0], keys[1], keys[3], key_of("a")]
            assert store(tier, [key_of("b")], SLOT_BYTES) == [True]
            assert stored_keys(tier) == [keys[1], keys[3], key_of("a"), key_of("b")]
            assert tier.counters.fallback_evictions == 2
            check_slots(tier)

    def test_pages_of_the_batch_itself_are_not_evicted_for_it(self, tmp_path: Path) -> None:
        old = keys_of("old", 2)
        with closing(open_disk(tmp_path, 2)) as tier:
            store(tier, old, SLOT_BYTES)

            assert store(tier, [*old, key_of("new")], SLOT_BYTES) == [True, True, False]
            assert tier.counters.extra["no_room"] == 1
            assert stored_keys(tier) == old

    def test_a_slot_with_a_damaged_record_is_found_again_when_room_is_needed(self, tmp_path: Path) -> None:
        keys = keys_of("page", 4)
        with closing(open_disk(tmp_path, 4)) as tier:
            store(tier, keys, SLOT_BYTES)
            put_raw_record(tier, keys[1], b"garbage")
            assert fetch(tier, keys[1:2], SLOT_BYTES) == [None]

            assert store(tier, [key_of("new")], SLOT_BYTES) == [True]

            assert tier.counters.fallback_evictions == 0
            assert tier.contains([keys[0], keys[2], keys[3], key_of("new")], timeout_s=TIMEOUT_S) == [True] * 4

    def test_a_scan_of_many_batches_yields_each_page_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.page_table.SCAN_BATCH", 3)
        keys = keys_of("page", 8)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)

            seen = []
            for page in tier.scan():
                seen.append(page.key)
                tier.touch([page.key], expires_at=0.0, timeout_s=TIMEOUT_S)  # moves behind the end of this scan

            assert seen == keys


class TestIndexMap:
    """The index has address space of its own; that it is used up is not a tier full of pages."""

    @pytest.fixture
    def small_map(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.index_map._INDEX_FIXED_BYTES", 256 << 10)
        monkeypatch.setattr("kvstore.tiers.disk.index_map._INDEX_BYTES_PER_SLOT", 0)

    @pytest.mark.usefixtures("small_map")
    def test_an_index_that_outgrows_its_map_gets_a_larger_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        keys = keys_of("page", 200)
        meta = PageMeta(64, tokens=bytes(8192))
        with closing(open_disk(tmp_path, 200)) as tier, caplog.at_level(logging.WARNING):
            assert all(store(tier, [key], SLOT_BYTES, meta=meta)[0] for key in keys)

            assert fetch(tier, keys, SLOT_BYTES, meta=meta) == [payload(key, 64) for key in keys]
            assert (tier.counters.extra["no_room"], tier.counters.fallback_evictions) == (0, 0)
            assert tier.counters.extra["map_full"] >= 1
            assert "does not fit its map of" in caplog.text
            check_slots(tier)

    @pytest.mark.usefixtures("small_map")
    def test_a_map_that_cannot_grow_is_unavailable_and_not_full_of_pages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = keys_of("page", 200)
        meta = PageMeta(64, tokens=bytes(8192))
        monkeypatch.setattr("kvstore.tiers.disk.directory.has_address_space", lambda num_bytes: False)
        with closing(open_disk(tmp_path, 200)) as tier:
            stored: list[PageKey] = []

            def store_all() -> None:
                for key in keys:
                    store(tier, [key], SLOT_BYTES, meta=meta)
                    stored.append(key)

            with pytest.raises(TierUnavailable, match="does not fit its map of"):
                store_all()

            assert 0 < len(stored) < 200
            assert (tier.counters.extra["no_room"], tier.counters.extra["map_full"]) == (0, 1)
            assert fetch(tier, stored, SLOT_BYTES, meta=meta) == [payload(key, 64) for key in stored]

            monkeypatch.undo()  # somebody gave address space back
            assert all(store(tier, [key], SLOT_BYTES, meta=meta)[0] for key in keys)
            check_slots(tier)

    @pytest.mark.usefixtures("small_map")
    def test_a_process_whose_map_is_too_small_for_what_another_wrote_follows(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 200)) as tier:
            child = run_child(STORE_MANY, tmp_path)
            assert child.stdout is not None
            assert child.stdout.read() == b"stored 200\n"
            child.stdout.close()
            child.wait()
            meta = PageMeta(64, tokens=bytes(8192))

            assert fetch(tier, keys_of("page", 200), SLOT_BYTES, meta=meta) == [
                payload(key, 64) for key in keys_of("page", 200)
            ]
            assert store(tier, keys_of("more", 1), SLOT_BYTES) == [True]

    def test_calls_wait_while_the_map_grows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = keys_of("page", 1)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)
            index = index_of(tier)
            grow, answers = index.grow_map, []
            reader = threading.Thread(target=lambda: answers.append(fetch(tier, keys, SLOT_BYTES)))

            def grow_slowly(map_bytes: int) -> None:
                reader.start()
                grow(map_bytes)

            monkeypatch.setattr(index, "grow_map", grow_slowly)
            tier._directory.enlarge_map(IndexMapFull("full", index.map_bytes))
            reader.join(TIMEOUT_S)

            assert answers == [[payload(keys[0], SLOT_BYTES)]]


class TestOtherProcesses:
    def test_slots_of_a_dead_writer_are_taken_back_when_room_is_needed(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, 4)) as tier:
            child = run_child(CLAIM_AND_HANG, tmp_path)
            assert child.stdout is not None
            assert child.stdout.readline() == b"claimed 3\n"
            assert store(tier, keys_of("page", 2), SLOT_BYTES) == [True, False]  # three slots are being written

            child.kill()
            child.wait()
            child.stdout.close()

            assert store(tier, keys_of("more", 3), SLOT_BYTES) == [True] * 3
            assert tier.counters.fallback_evictions == 0
            check_slots(tier)

    def test_slots_of_a_dead_writer_are_taken_back_at_the_next_opening(self, tmp_path: Path) -> None:
        open_disk(tmp_path, 4).close()
        child = run_child(CLAIM_AND_HANG, tmp_path)
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
        child.wait()
        child.stdout.close()

        with closing(open_disk(tmp_path, 4)) as tier:
            assert index_of(tier).usage() == {"slots": 4, "pages": 0, "writing": 0, "free": 4, "leaked": 0}

    def test_a_claim_that_was_taken_away_is_not_published(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path)) as tier:
            index, deadline = index_of(tier), time.monotonic() + TIMEOUT_S
            (claim,) = index.claim([key_of("page")], [], now=0.0, deadline=deadline).answers
            assert not isinstance(claim, bool)
            with index._write(deadline) as (txn, _):
                index._slots.give_back(txn, claim)
            from kvstore.tiers.disk.index import Written

            page = Written(key_of("page"), claim, bytes(128), 0.0, b"")

            assert index.publish([page], [], deadline=deadline) == [False]
            assert tier.contains([key_of("page")], timeout_s=TIMEOUT_S) == [False]
            check_slots(tier)

    def test_the_first_of_two_writers_of_a_key_wins_also_when_both_are_writing(self, tmp_path: Path) -> None:
        key = key_of("page")
        with closing(open_disk(tmp_path)) as one, closing(open_disk(tmp_path)) as two:
            slab = one._directory.slab
            write = slab.write

            def write_second(slot: int, view: memoryview, num_bytes: int) -> None:
                slab.write = write  # type: ignore[method-assign]
                assert store(two, [key], SLOT_BYTES, version=2) == [True]
                write(slot, view, num_bytes)

            slab.write = write_second  # type: ignore[method-assign]

            assert store(one, [key], SLOT_BYTES, version=1) == [True]

            assert fetch(one, [key], SLOT_BYTES) == [payload(key, SLOT_BYTES, version=2)]
            check_slots(one)

    def test_a_page_that_is_evicted_while_it_is_read_is_lost_not_corrupt(self, tmp_path: Path) -> None:
        old, new = keys_of("page", 2)
        with closing(open_disk(tmp_path, 1)) as one, closing(open_disk(tmp_path, 1)) as two:
            store(one, [old], SLOT_BYTES)
            slab = one._directory.slab
            read = slab.read

            def read_late(slot: int, view: memoryview, num_bytes: int) -> bool:
                slab.read = read  # type: ignore[method-assign]
                assert store(two, [new], SLOT_BYTES, evict=[old]) == [True]
                return read(slot, view, num_bytes)

            slab.read = read_late  # type: ignore[method-assign]

            assert fetch(one, [old], SLOT_BYTES) == [None]
            assert (one.counters.lost_pages, one.counters.corrupt_pages) == (1, 0)
            assert fetch(one, [new], SLOT_BYTES) == [payload(new, SLOT_BYTES)]

    def test_a_process_that_hangs_in_a_transaction_delays_writers_only_until_their_deadline(
        self, tmp_path: Path
    ) -> None:
        keys = keys_of("page", 1)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)
            child = run_child(HOLD_THE_WRITE_LOCK, tmp_path)
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            views = filled([key_of("new")], SLOT_BYTES)

            with pytest.raises(TierUnavailable, match="write lock"):
                tier.write_from([key_of("new")], views, [PageMeta(SLOT_BYTES)], timeout_s=0.05)
            assert fetch(tier, keys, SLOT_BYTES) == [payload(keys[0], SLOT_BYTES)]  # reading needs no lock

            child.kill()
            child.wait()
            child.stdout.close()
            assert store(tier, [key_of("new")], SLOT_BYTES) == [True]

    def test_a_process_that_sets_up_for_too_long_keeps_others_out_with_a_message(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.directory.OPEN_TIMEOUT_S", 0.05)
        child = run_child(HOLD_THE_SET_UP, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"

        with pytest.raises(TierUnavailable, match="setting up"):
            open_disk(tmp_path)

        child.kill()
        child.wait()
        child.stdout.close()
        open_disk(tmp_path).close()


STORE_MANY = """
with closing(open_disk(path, 200)) as tier:
    keys = keys_of("page", 200)
    print("stored", sum(store(tier, [key], SLOT_BYTES, meta=PageMeta(64, tokens=bytes(8192)))[0] for key in keys))
"""
CLAIM_AND_HANG = """
index = index_of(open_disk(path, 4))
answers = index.claim(keys_of("claimed", 3), [], now=0.0, deadline=time.monotonic() + 10).answers
print("claimed", len([claim for claim in answers if not isinstance(claim, bool)]), flush=True)
time.sleep(60)
"""
HOLD_THE_WRITE_LOCK = """
with DirectoryLock(path / "lock").writing(time.monotonic() + 10):
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_THE_SET_UP = """
assert DirectoryLock(path / "lock").enter(time.monotonic() + 10)
print("held", flush=True)
time.sleep(60)
"""
HOLD_AS_A_USER = """
lock = DirectoryLock(path / "lock")
assert lock.enter(time.monotonic() + 10)
lock.share()
print("held", flush=True)
time.sleep(60)
"""
PREAMBLE = """
import sys, time
from contextlib import closing
from pathlib import Path
from kvstore.page import PageMeta
from kvstore.tiers.disk.directory_lock import DirectoryLock
from tests.helpers.disk import SLOT_BYTES, index_of, open_disk
from kvstore.testing.pages import keys_of, store
path = Path(sys.argv[1])
"""


def version_of(tier: DiskTier) -> int:
    geometry = index_of(tier).geometry()
    assert geometry is not None
    return geometry.version


def write_version(tier: DiskTier, version: int) -> None:
    directory = tier._directory
    index_of(tier).set_up(dataclasses.replace(directory.geometry, version=version), directory.num_slots)


def run_child(program: str, path: Path) -> Popen[bytes]:
    return Popen([sys.executable, "-c", PREAMBLE + program, str(path)], stdout=PIPE, cwd=ROOT)


OPEN_AND_WAIT = """
import sys
from pathlib import Path
from tests.helpers.disk import open_disk
tier = open_disk(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("open", flush=True)
sys.stdin.readline()
tier.close()
"""


class TestADirectoryOfItsOwn:
    """`disk.shared = false`: one process stores there, or several that all let others in."""

    @pytest.fixture
    def holder(self, tmp_path: Path) -> Iterator[Callable[[str], Popen[bytes]]]:
        children: list[Popen[bytes]] = []

        def hold(kind: str) -> Popen[bytes]:
            child = Popen([sys.executable, "-c", OPEN_AND_WAIT, tmp_path, kind], stdin=PIPE, stdout=PIPE, cwd=ROOT)
            children.append(child)
            assert child.stdout is not None
            assert child.stdout.readline() == b"open\n"
            return child

        yield hold
        for child in children:
            child.kill()
            child.communicate()

    def test_nobody_is_let_in_beside_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Callable[[str], Popen[bytes]]
    ) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.directory_lock.OWNER_WAIT_S", 0.1)
        child = holder("alone")
        words = rf"disk\.path is {tmp_path}: process {child.pid} has it open with disk\.shared = false; stop it, or"

        with pytest.raises(ConfigError, match=words):
            open_disk(tmp_path)
        with pytest.raises(
            ConfigError, match=rf"disk\.shared is false, and process {child.pid} has .* {tmp_path} open"
        ):
            open_disk(tmp_path, shared=False)

        child.communicate(b"\n")
        open_disk(tmp_path).close()

    def test_it_is_not_opened_beside_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Callable[[str], Popen[bytes]]
    ) -> None:
        monkeypatch.setattr("kvstore.tiers.disk.directory_lock.OWNER_WAIT_S", 0.1)
        child = holder("shared")

        with pytest.raises(
            ConfigError, match=rf"disk\.shared is false, and process {child.pid} has .* {tmp_path} open"
        ):
            open_disk(tmp_path, shared=False)
        open_disk(tmp_path).close()

        child.communicate(b"\n")
        open_disk(tmp_path, shared=False).close()

    def test_a_restart_after_a_kill_is_let_in(self, tmp_path: Path, holder: Callable[[str], Popen[bytes]]) -> None:
        for _ in range(3):
            holder("alone").kill()  # and is not waited for, as by a supervisor that starts the next one at once

        with closing(open_disk(tmp_path, shared=False)) as tier:
            assert store(tier, keys_of("page", 2), SLOT_BYTES) == [True, True]

    def test_whoever_only_looks_is_let_in(self, tmp_path: Path, holder: Callable[[str], Popen[bytes]]) -> None:
        holder("alone")

        with closing(DiskTier.open(tmp_path, "layout", SLOT_BYTES, 0, read_only=True)) as tier:
            assert stored_keys(tier) == []

    def test_a_second_store_of_one_process_is_refused_as_well(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path, shared=False)), pytest.raises(ConfigError, match="another store of this proc"):
            open_disk(tmp_path)
        with closing(open_disk(tmp_path)), pytest.raises(ConfigError, match=r"disk\.shared is false"):
            open_disk(tmp_path, shared=False)
        open_disk(tmp_path, shared=False).close()

    def test_the_configuration_says_which(self, tmp_path: Path) -> None:
        with closing(open_small(tmp_path, disk={"shared": False})), pytest.raises(ConfigError, match="another store"):
            open_small(tmp_path)


class TestLocks:
    def test_threads_of_one_process_exclude_each_other_too(self, tmp_path: Path) -> None:
        lock = DirectoryLock(tmp_path / "lock")

        def write() -> None:
            with lock.writing(time.monotonic() + 0.01):
                pass

        with ThreadPoolExecutor(1) as other:
            with lock.writing(time.monotonic() + 1), pytest.raises(TierUnavailable, match="another thread"):
                other.submit(write).result()
            other.submit(write).result()
        lock.close()

    def test_a_closed_tier_leaves_no_living_writer(self, tmp_path: Path) -> None:
        tier = open_disk(tmp_path)
        writer = index_of(tier)._slots.writer
        tier.close()
        lock = DirectoryLock(tmp_path / "lock")

        assert writer > 0
        assert not lock.is_alive(writer)
        lock.close()


class TestReports:
    def test_describe_tells_geometry_and_contents_without_configuration(self, tmp_path: Path) -> None:
        clock = FakeClock()
        with closing(open_disk(tmp_path, now=clock)) as tier:
            store(tier, keys_of("root", 2), SLOT_BYTES, meta=PageMeta(100))
            clock.advance(50)
            store(tier, keys_of("leaf", 1), SLOT_BYTES, meta=PageMeta(200, depth=1, expires_at=5.0))

        facts = describe(tmp_path)

        assert facts["layout"] == "layout"
        assert (facts["slot_bytes"], facts["slots"], facts["capacity_bytes"]) == (SLOT_BYTES, 8, 8 * SLOT_BYTES)
        assert (facts["pages"], facts["free"], facts["writing"], facts["expired"]) == (3, 5, 0, 1)
        assert facts["stored_bytes"] == 400
        assert facts["pages_by_depth"] == {0: 2, 1: 1}
        assert (facts["oldest_created_at"], facts["newest_created_at"]) == (clock() - 50, clock())

    def test_verify_finds_exactly_the_bad_pages(self, tmp_path: Path) -> None:
        keys = keys_of("page", 5)
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys, SLOT_BYTES)
            flip_slab_bit(tier, keys[1], 7, 0)
            put_raw_record(tier, keys[3], raw_record(tier, keys[3])[:-1] + b"\0")

        checks = {check.key: check for check in verify(tmp_path)}

        assert {key for key, check in checks.items() if check.ok} == {keys[0], keys[2], keys[4]}
        assert "does not fit its checksum" in checks[keys[1]].reason
        assert "index record" in checks[keys[3]].reason

    def test_reports_work_beside_a_tier_that_has_the_directory_open(self, tmp_path: Path) -> None:
        with closing(open_disk(tmp_path)) as tier:
            store(tier, keys_of("page", 2), SLOT_BYTES)

            assert describe(tmp_path)["pages"] == 2
            assert all(check.ok for check in verify(tmp_path))
            assert store(tier, keys_of("page", 3), SLOT_BYTES) == [True] * 3

    def test_reports_on_a_place_without_pages_say_so(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no page directory"):
            describe(tmp_path)
        with pytest.raises(ConfigError, match="no page directory"):
            list(verify(tmp_path / "nowhere"))


def test_a_reader_that_died_keeps_no_page_of_the_index_from_being_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.tiers.disk.index_map._INDEX_FIXED_BYTES", 1 << 20)
    monkeypatch.setattr("kvstore.tiers.disk.index_map._INDEX_BYTES_PER_SLOT", 0)
    with closing(open_disk(tmp_path, 8)) as tier:
        child = Popen([sys.executable, "-c", READ_AND_HANG, str(tmp_path / "index")], stdout=PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"reading\n"
        child.kill()
        child.wait()
        child.stdout.close()

        for number in range(100):
            assert store(tier, keys_of(f"page {number}", 4), SLOT_BYTES) == [True] * 4
        assert tier.counters.extra["map_full"] == 0


READ_AND_HANG = """
import lmdb, sys, time
env = lmdb.open(sys.argv[1], max_dbs=8, lib_version=0)
txn = env.begin()
print("reading", flush=True)
time.sleep(60)
"""
