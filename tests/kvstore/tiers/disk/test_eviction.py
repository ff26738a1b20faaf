"""Who rules the disk: docs/design.md, "One ruler of the disk"."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from eviction.lru import Recency
from eviction.policy import K
from eviction.ranked import Ranked
from kvstore.page import PageMeta, page_key
from kvstore.store import LocalStore
from kvstore.testing.pages import FakeClock, key_of, keys_of, store
from tests.helpers.disk import SLOT_BYTES, check_slots, open_disk, stored_keys
from tests.helpers.stores import PAGE_BYTES, open_small, prompt, save
from tests.helpers.waiting import WAIT_S

PAGES = 6  # of the disk tier


class NewestFirst(Ranked[K]):
    """Names the page that came or was used last, which the index's order would keep longest."""

    def __init__(self) -> None:
        super().__init__(Backwards)


class Backwards(Recency[K]):
    def victims(self, n: int) -> list[K]:
        return super().members()[::-1][:n]


def open_store_on(path: Path, **disk: object) -> LocalStore:
    policy = f"{__name__}:{NewestFirst.__name__}"
    return open_small(path, disk={"capacity_bytes": PAGES * PAGE_BYTES, "policy": policy, **disk})


def save_one(store: LocalStore, seed: int) -> bytes:
    """Save a prompt of one block, and wait until it is on disk; returns its key there."""
    request = store.request(prompt(1, seed))
    save(store, request)
    assert store.flush(WAIT_S)
    return page_key(request.keys[0])


@pytest.mark.parametrize("shared", [False, True])
def test_a_planner_alone_decides_who_leaves_against_the_order_of_the_index(tmp_path: Path, shared: bool) -> None:
    with open_store_on(tmp_path, shared=shared) as one:
        keys = [save_one(one, seed) for seed in range(PAGES)]
        (tier,) = (lane.tier for lane in one._dispatcher.lanes.values())
        assert [page.key for page in tier.scan()] == keys  # oldest first: the index would name keys[0]

        newest = save_one(one, PAGES)

        assert [page.key for page in tier.scan()] == [*keys[:-1], newest]
        assert tier.counters.fallback_evictions == 0


def test_where_others_have_taken_the_room_the_index_decides_by_its_own_order(tmp_path: Path) -> None:
    with open_store_on(tmp_path, shared=True) as one, open_store_on(tmp_path, shared=True) as other:
        theirs = [save_one(other, 100 + seed) for seed in range(PAGES)]
        (tier,) = (lane.tier for lane in one._dispatcher.lanes.values())

        mine = save_one(one, 0)  # by its own books the tier is empty: it names nobody

        assert [page.key for page in tier.scan()] == [*theirs[1:], mine]
        assert tier.counters.fallback_evictions == 1


def test_without_a_planner_the_index_decides(tmp_path: Path) -> None:
    keys = keys_of("page", PAGES)
    with closing(open_disk(tmp_path, PAGES, shared=False)) as tier:
        store(tier, keys, SLOT_BYTES)
        tier.touch(keys[:1], expires_at=0.0, timeout_s=WAIT_S)

        store(tier, [key_of("new")], SLOT_BYTES)

        assert stored_keys(tier) == [*keys[2:], keys[0], key_of("new")]
        assert tier.counters.fallback_evictions == 1


def test_what_expired_while_nobody_ran_holds_no_slot_that_a_planner_counts_as_free(tmp_path: Path) -> None:
    clock, num_pages = FakeClock(), 100  # more than an eviction looks at
    keys = keys_of("page", num_pages)
    with closing(open_disk(tmp_path, num_pages, now=clock)) as tier:
        store(tier, keys[:-1], SLOT_BYTES)
        store(tier, keys[-1:], SLOT_BYTES, meta=PageMeta(SLOT_BYTES, expires_at=clock() + 10))
    clock.advance(11)
    with closing(open_disk(tmp_path, num_pages, now=clock)) as tier:
        known = stored_keys(tier)  # what a planner books when it starts

        assert store(tier, [key_of("new")], SLOT_BYTES) == [True]  # one more fits by its books

        assert stored_keys(tier) == [*known, key_of("new")]
        assert tier.counters.fallback_evictions == 0
        check_slots(tier)


def test_a_directory_that_is_only_read_keeps_what_has_expired(tmp_path: Path) -> None:
    clock = FakeClock()
    with closing(open_disk(tmp_path, PAGES, now=clock)) as tier:
        store(tier, [key_of("a")], SLOT_BYTES, meta=PageMeta(SLOT_BYTES, expires_at=clock() + 10))
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*.mdb")}
    clock.advance(11)

    with closing(open_disk(tmp_path, PAGES, now=clock, read_only=True)) as tier:
        assert stored_keys(tier) == []

    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*.mdb")} == before
