"""The promises of every tier (kvstore/tiers/base.py), as a suite to inherit.

A subclass supplies a `tier` fixture over `slot_bytes` slots with room for `capacity` pages and the clock of the `clock`
fixture, and three ways past the code under test to the medium itself: `regions`, `flip_bit` and, where time cannot be
injected, `pass_time`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from kvstore.errors import TierUnavailable
from kvstore.page import PageKey, PageMeta
from kvstore.testing.pages import TIMEOUT_S, FakeClock, fetch, filled, key_of, keys_of, payload, slots, store
from kvstore.tiers.base import Tier


class TierContract:
    """Inherit, override the fixture `tier` and the hooks, and set what the medium cannot do to False."""

    slot_bytes = 8192
    capacity = 8
    is_bounded = True  # capacity_pages is a number and is kept
    can_scan = True
    flips_per_region = 12  # sampled bit positions, besides the first and the last byte

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @pytest.fixture
    def tier(self, clock: FakeClock) -> Iterator[Tier]:
        raise NotImplementedError

    def regions(self, tier: Tier, key: PageKey) -> dict[str, int]:
        """Name -> length in bytes of every place where the medium keeps bytes of this page."""
        raise NotImplementedError

    def flip_bit(self, tier: Tier, key: PageKey, region: str, byte: int, bit: int) -> None:
        """Flip one stored bit without the tier's help."""
        raise NotImplementedError

    def pass_time(self, tier: Tier, clock: FakeClock, seconds: float) -> None:
        clock.advance(seconds)

    # Bytes in, bytes out.

    def test_a_written_page_reads_back_the_same(self, tier: Tier) -> None:
        keys = keys_of("page", 4)

        assert store(tier, keys, self.slot_bytes) == [True] * 4

        assert fetch(tier, keys, self.slot_bytes) == [payload(key, self.slot_bytes) for key in keys]

    def test_a_page_shorter_than_its_slot_reads_back_the_same(self, tier: Tier) -> None:
        for num_bytes in (1, 63, 4096, 4097, self.slot_bytes - 1):
            key, meta = key_of(num_bytes), PageMeta(num_bytes)

            assert store(tier, [key], self.slot_bytes, meta=meta) == [True]

            assert fetch(tier, [key], self.slot_bytes, meta=meta) == [payload(key, num_bytes)]
            tier.delete([key], timeout_s=TIMEOUT_S)

    def test_an_unknown_key_is_a_miss_beside_known_ones(self, tier: Tier) -> None:
        known = keys_of("known", 2)
        store(tier, known, self.slot_bytes)
        asked = [known[0], key_of("unknown"), known[1]]

        assert tier.contains(asked, timeout_s=TIMEOUT_S) == [True, False, True]
        assert [page is not None for page in fetch(tier, asked, self.slot_bytes)] == [True, False, True]

    def test_empty_batches_answer_nothing(self, tier: Tier) -> None:
        assert tier.contains([], timeout_s=TIMEOUT_S) == []
        assert tier.read_into([], [], [], timeout_s=TIMEOUT_S) == []
        assert tier.write_from([], [], [], timeout_s=TIMEOUT_S) == []
        assert tier.touch([], expires_at=0.0, timeout_s=TIMEOUT_S) == []
        tier.delete([], timeout_s=TIMEOUT_S)

    def test_group_and_shard_name_different_pages(self, tier: Tier) -> None:
        keys = [key_of("block", group, shard) for group in (0, 1) for shard in (0, 1)]

        store(tier, keys, self.slot_bytes)

        assert fetch(tier, keys, self.slot_bytes) == [payload(key, self.slot_bytes) for key in keys]

    def test_the_tier_keeps_no_reference_to_a_view(self, tier: Tier) -> None:
        key = key_of("page")
        written = filled([key], self.slot_bytes)
        tier.write_from([key], written, [PageMeta(self.slot_bytes)], timeout_s=TIMEOUT_S)
        read = slots(1, self.slot_bytes)
        tier.read_into([key], read, [PageMeta(self.slot_bytes)], timeout_s=TIMEOUT_S)

        written[0][:] = bytes(self.slot_bytes)
        written[0].release()  # BufferError if something still holds it
        read[0].release()

        assert fetch(tier, [key], self.slot_bytes) == [payload(key, self.slot_bytes)]

    # Who wins, who leaves.

    def test_the_first_writer_wins(self, tier: Tier) -> None:
        key = key_of("page")
        store(tier, [key], self.slot_bytes)

        assert store(tier, [key], self.slot_bytes, version=1) == [True]

        assert fetch(tier, [key], self.slot_bytes) == [payload(key, self.slot_bytes)]

    def test_a_key_twice_in_one_batch_is_stored_once(self, tier: Tier) -> None:
        key = key_of("page")

        assert store(tier, [key, key], self.slot_bytes) == [True, True]

        assert fetch(tier, [key, key], self.slot_bytes) == [payload(key, self.slot_bytes)] * 2
        if self.can_scan:
            assert [page.key for page in tier.scan()] == [key]

    def test_evicted_keys_leave(self, tier: Tier) -> None:
        old, new = keys_of("old", 2), keys_of("new", 1)
        store(tier, old, self.slot_bytes)

        assert store(tier, new, self.slot_bytes, evict=[old[0], key_of("never stored")]) == [True]

        assert tier.contains([*old, *new], timeout_s=TIMEOUT_S) == [False, True, True]

    def test_eviction_makes_room_in_a_full_tier(self, tier: Tier) -> None:
        if not self.is_bounded:
            pytest.skip("the medium evicts by itself")
        old, new = keys_of("old", self.capacity), keys_of("new", 3)
        assert all(store(tier, old, self.slot_bytes))

        assert store(tier, new, self.slot_bytes, evict=old[:3]) == [True] * 3

        assert tier.contains(old[3:] + new, timeout_s=TIMEOUT_S) == [True] * self.capacity
        assert fetch(tier, new, self.slot_bytes) == [payload(key, self.slot_bytes) for key in new]

    def test_an_overfull_batch_keeps_the_capacity_and_tells_what_is_stored(self, tier: Tier) -> None:
        if not self.is_bounded:
            pytest.skip("the medium evicts by itself")
        keys = keys_of("page", self.capacity + 3)

        answers = store(tier, keys, self.slot_bytes)

        stored = tier.contains(keys, timeout_s=TIMEOUT_S)
        assert tier.capacity_pages == self.capacity
        assert stored == answers
        assert sum(stored) == self.capacity
        for key, ok, data in zip(keys, stored, fetch(tier, keys, self.slot_bytes), strict=True):
            assert data == (payload(key, self.slot_bytes) if ok else None)

    def test_a_deleted_page_is_gone_and_can_be_stored_again(self, tier: Tier) -> None:
        keys = keys_of("page", 2)
        store(tier, keys, self.slot_bytes)

        tier.delete([keys[0], key_of("unknown")], timeout_s=TIMEOUT_S)

        assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False, True]
        assert store(tier, keys[:1], self.slot_bytes, version=1) == [True]
        assert fetch(tier, keys[:1], self.slot_bytes) == [payload(keys[0], self.slot_bytes, version=1)]

    # Time.

    def test_an_expired_page_is_a_miss(self, tier: Tier, clock: FakeClock) -> None:
        keys = keys_of("page", 2)
        store(tier, keys[:1], self.slot_bytes, meta=PageMeta(self.slot_bytes, expires_at=clock() + 60))
        store(tier, keys[1:], self.slot_bytes)
        assert tier.contains(keys, timeout_s=TIMEOUT_S) == [True, True]

        self.pass_time(tier, clock, 61)

        assert tier.contains(keys, timeout_s=TIMEOUT_S) == [False, True]
        assert fetch(tier, keys, self.slot_bytes) == [None, payload(keys[1], self.slot_bytes)]
        assert tier.counters.corrupt_pages == 0

    def test_an_expired_page_gives_way_to_a_new_one(self, tier: Tier, clock: FakeClock) -> None:
        key = key_of("page")
        store(tier, [key], self.slot_bytes, meta=PageMeta(self.slot_bytes, expires_at=clock() + 60))
        self.pass_time(tier, clock, 61)

        assert store(tier, [key], self.slot_bytes, version=1) == [True]

        assert fetch(tier, [key], self.slot_bytes) == [payload(key, self.slot_bytes, version=1)]

    def test_touch_moves_the_deadline(self, tier: Tier, clock: FakeClock) -> None:
        keys = keys_of("page", 2)
        store(tier, keys, self.slot_bytes, meta=PageMeta(self.slot_bytes, expires_at=clock() + 60))

        assert tier.touch(keys[:1], expires_at=clock() + 600, timeout_s=TIMEOUT_S) == [True]
        self.pass_time(tier, clock, 61)

        assert fetch(tier, keys, self.slot_bytes) == [payload(keys[0], self.slot_bytes), None]

    def test_touch_without_a_deadline_keeps_the_one_there_is(self, tier: Tier, clock: FakeClock) -> None:
        key = key_of("page")
        store(tier, [key], self.slot_bytes, meta=PageMeta(self.slot_bytes, expires_at=clock() + 60))

        assert tier.touch([key], expires_at=0.0, timeout_s=TIMEOUT_S) == [True]
        assert tier.contains([key], timeout_s=TIMEOUT_S) == [True]
        self.pass_time(tier, clock, 61)

        assert tier.contains([key], timeout_s=TIMEOUT_S) == [False]

    def test_touch_of_what_is_gone_is_false(self, tier: Tier, clock: FakeClock) -> None:
        keys = keys_of("page", 2)
        store(tier, keys[:1], self.slot_bytes, meta=PageMeta(self.slot_bytes, expires_at=clock() + 60))
        store(tier, keys[1:], self.slot_bytes)
        self.pass_time(tier, clock, 61)

        asked = [keys[0], key_of("unknown"), keys[1]]

        assert tier.touch(asked, expires_at=clock() + 600, timeout_s=TIMEOUT_S) == [False, False, True]

    # What is told about pages.

    def test_scan_yields_least_recently_used_first(self, tier: Tier) -> None:
        if not self.can_scan:
            assert list(tier.scan()) == []
            return
        keys = keys_of("page", 4)
        for key in keys:
            store(tier, [key], self.slot_bytes)

        tier.touch([keys[1], keys[0]], expires_at=0.0, timeout_s=TIMEOUT_S)

        assert [page.key for page in tier.scan()] == [keys[2], keys[3], keys[1], keys[0]]

    def test_scan_yields_what_was_stored_beside_the_bytes(self, tier: Tier, clock: FakeClock) -> None:
        if not self.can_scan:
            pytest.skip("the medium cannot be walked cheaply")
        root, leaf, gone = keys_of("page", 3)
        root_meta = PageMeta(100)
        leaf_meta = PageMeta(200, parent=root[:32], depth=1, expires_at=clock() + 60, tokens=b"\1\0\0\0\2\0\0\0")
        store(tier, [root], self.slot_bytes, meta=root_meta)
        store(tier, [leaf], self.slot_bytes, meta=leaf_meta)
        store(tier, [gone], self.slot_bytes, meta=PageMeta(300, expires_at=clock() + 5))

        self.pass_time(tier, clock, 10)

        assert [(page.key, page.meta) for page in tier.scan()] == [(root, root_meta), (leaf, leaf_meta)]

    def test_the_medium_answers_a_ping(self, tier: Tier) -> None:
        tier.ping(timeout_s=TIMEOUT_S)

    # Never the wrong page.

    def test_a_page_of_other_tokens_is_a_collision_and_stays_for_its_owner(self, tier: Tier) -> None:
        key = key_of("page")
        mine = PageMeta(self.slot_bytes, tokens=b"\1\0\0\0\2\0\0\0")
        other = PageMeta(self.slot_bytes, tokens=b"\1\0\0\0\3\0\0\0")
        store(tier, [key], self.slot_bytes, meta=mine)

        assert fetch(tier, [key], self.slot_bytes, meta=other) == [None]

        assert tier.counters.collisions == 1
        assert tier.counters.corrupt_pages == 0
        assert fetch(tier, [key], self.slot_bytes, meta=mine) == [payload(key, self.slot_bytes)]

    def test_a_page_without_tokens_does_not_answer_for_tokens(self, tier: Tier) -> None:
        key = key_of("page")
        store(tier, [key], self.slot_bytes)

        assert fetch(tier, [key], self.slot_bytes, meta=PageMeta(self.slot_bytes, tokens=b"\1\0\0\0")) == [None]

        assert tier.counters.collisions == 1

    def test_a_page_of_another_length_is_dropped_and_counted(self, tier: Tier) -> None:
        key = key_of("page")
        store(tier, [key], self.slot_bytes, meta=PageMeta(self.slot_bytes - 1))

        assert fetch(tier, [key], self.slot_bytes) == [None]

        assert tier.counters.corrupt_pages == 1
        assert tier.contains([key], timeout_s=TIMEOUT_S) == [False]

    def test_a_flipped_bit_anywhere_is_a_counted_miss_and_the_copy_is_dropped(self, tier: Tier) -> None:
        key, neighbour = keys_of("page", 2)
        meta = PageMeta(self.slot_bytes - 100, parent=neighbour[:32], depth=3, expires_at=9e9, tokens=bytes(range(64)))
        store(tier, [neighbour], self.slot_bytes)
        rng = random.Random(0)

        flips = 0
        store(tier, [key], self.slot_bytes, meta=meta)
        for region, length in self.regions(tier, key).items():
            positions = {0, length - 1, *(rng.randrange(length) for _ in range(self.flips_per_region))}
            if length <= 512:
                positions = set(range(length))
            for position in sorted(positions):
                assert store(tier, [key], self.slot_bytes, meta=meta) == [True]
                self.flip_bit(tier, key, region, position, rng.randrange(8))

                assert fetch(tier, [key], self.slot_bytes, meta=meta) == [None], (region, position)

                flips += 1
                assert tier.counters.corrupt_pages == flips, (region, position)
                assert tier.contains([key], timeout_s=TIMEOUT_S) == [False], (region, position)
        assert fetch(tier, [neighbour], self.slot_bytes) == [payload(neighbour, self.slot_bytes)]

    def test_threads_at_once_read_right_bytes_or_nothing(self, tier: Tier) -> None:
        keys = keys_of("page", self.capacity * 2)
        wrong: list[PageKey] = []
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(40):
                    batch = rng.sample(keys, 3)
                    if rng.random() < 0.5:
                        store(tier, batch, self.slot_bytes, evict=rng.sample(keys, 3))
                    else:
                        pages = fetch(tier, batch, self.slot_bytes)
                        wrong.extend(
                            key
                            for key, data in zip(batch, pages, strict=True)
                            if data is not None and data != payload(key, self.slot_bytes)
                        )
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert not errors
        assert not wrong
        assert tier.counters.corrupt_pages == 0
        if self.is_bounded:
            assert sum(tier.contains(keys, timeout_s=TIMEOUT_S)) <= self.capacity

    # The end.

    def test_a_closed_tier_is_unavailable_and_closes_again(self, tier: Tier) -> None:
        key = key_of("page")
        tier.close()
        tier.close()

        with pytest.raises(TierUnavailable):
            tier.contains([key], timeout_s=TIMEOUT_S)
        with pytest.raises(TierUnavailable):
            fetch(tier, [key], self.slot_bytes)
        with pytest.raises(TierUnavailable):
            store(tier, [key], self.slot_bytes)
        with pytest.raises(TierUnavailable):
            tier.ping(timeout_s=TIMEOUT_S)
