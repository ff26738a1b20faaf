from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from eviction.registry import make_policy
from kvstore.errors import TierFull
from kvstore.page import PageKey
from kvstore.plan.records import CutReason, LeaseState
from kvstore.plan.tier_plan import TierPlan
from kvstore.store import LocalStore
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.stores import (
    BLOCK,
    PAGE_BYTES,
    load,
    memory_tier,
    open_small,
    prompt,
    redis_like,
    save,
    store_over,
    use,
)
from tests.helpers.waiting import WAIT_S, wait_until


class TestSavingAndLoading:
    def test_what_was_saved_is_loaded(self, store: LocalStore) -> None:
        assert use(store, prompt(5)) == 0
        assert use(store, prompt(5)) == 5

    def test_a_fork_loads_what_it_shares(self, store: LocalStore) -> None:
        use(store, prompt(8))
        fork = prompt(8)
        fork[5 * BLOCK] += 1

        assert use(store, fork) == 5

    def test_the_last_token_is_always_left_to_compute(self, store: LocalStore) -> None:
        use(store, prompt(4, tail=0))

        assert store.lookup(store.request(prompt(4, tail=0))).num_tokens == 3 * BLOCK

    def test_pages_that_were_not_filled_are_not_published(self, store: LocalStore) -> None:
        request = store.request(prompt(4))
        lease = store.prepare_save(request, 0, 4)

        store.complete(lease, filled=[True, True, False, True])

        assert store.lookup(request).num_blocks == 2

    def test_a_released_save_leaves_nothing(self, store: LocalStore) -> None:
        request = store.request(prompt(4))

        store.release(store.prepare_save(request, 0, 4))

        assert store.stats()["slots"]["free"] == 64
        assert store.stats()["blocks"] == 0

    def test_two_requests_do_not_save_a_block_twice(self, store: LocalStore) -> None:
        first = store.prepare_save(store.request(prompt(4)), 0, 4)

        second = store.prepare_save(store.request(prompt(4)), 0, 4)

        assert (len(first.pages), len(second.pages)) == (4, 0)
        assert store.stats()["dedup_saves"] == 4

    def test_ending_a_lease_twice_is_harmless(self, store: LocalStore) -> None:
        request = store.request(prompt(3))
        save(store, request)
        lease = store.prepare_load(request, 3)

        store.complete(lease)
        store.release(lease)

        assert store.poll(lease).state is LeaseState.CLOSED

    def test_blocks_the_engine_has_are_neither_pinned_nor_counted(self, store: LocalStore) -> None:
        request = store.request(prompt(4))
        save(store, request)

        lease = store.prepare_load(request, 4, first=3)
        status = store.poll(lease)
        store.complete(lease)

        assert [page.block for page in lease.pages] == [3]
        assert (status.num_blocks, lease.by_tier) == (4, {"host": 1})
        assert store.stats()["hit_blocks"] == {"host": 1}

    def test_a_prompt_larger_than_the_slab_keeps_its_head(self, store: LocalStore) -> None:
        request = store.request(prompt(100))

        lease = store.prepare_save(request, 0, 100)
        store.complete(lease)
        more = store.prepare_save(request, 64, 36)
        store.complete(more)

        assert [page.block for page in lease.pages] == list(range(64))
        assert (lease.skipped, more.skipped, len(more.pages)) == (36, 36, 0)
        assert store.lookup(request).num_blocks == 64

    def test_a_slab_of_pinned_pages_skips_saves_and_still_answers(self) -> None:
        with open_small(store={"max_pinned_fraction": 1.0}) as store:
            request = store.request(prompt(64))
            save(store, request)
            assert store.keep.pin(request) == 64

            lease = store.prepare_save(store.request(prompt(3, seed=1)), 0, 3)
            store.release(lease)

            assert (len(lease.pages), lease.skipped) == (0, 3)
            assert load(store, request)[0] == 64
            assert store.keep.unpin(request) == 64
            assert save(store, store.request(prompt(3, seed=1))) == 3

    def test_the_oldest_tail_leaves_first(self, store: LocalStore) -> None:
        use(store, prompt(40, seed=1))
        use(store, prompt(20, seed=2))

        use(store, prompt(10, seed=3))  # 6 blocks too many

        assert store.lookup(store.request(prompt(40, seed=1))).num_blocks == 34
        assert store.lookup(store.request(prompt(20, seed=2))).num_blocks == 20

    def test_the_dead_owner_of_a_lease_holds_nothing(self, store: LocalStore) -> None:
        request = store.request(prompt(4))
        save(store, request)
        store.prepare_load(request, 4, owner="rank 0")
        store.prepare_save(store.request(prompt(2, seed=1)), 0, 2, owner="rank 0")

        assert store.release_owner("rank 0") == 2

        assert store.stats()["leases"] == 0
        assert store.stats()["pinned_pages"] == 0


class TestLowerTiers:
    def test_pages_come_back_from_disk_after_a_restart(self, tmp_path: Path) -> None:
        with open_small(tmp_path) as store:
            use(store, prompt(10))
        with open_small(tmp_path) as store:
            blocks, match = load(store, store.request(prompt(10)))

        assert blocks == 10
        assert match.by_tier == {"disk": 10}

    def test_another_process_sees_what_this_one_writes(self, tmp_path: Path) -> None:
        with open_small(tmp_path) as writer:
            # One process may open a directory once; a second store shares the tier.
            tier = writer._dispatcher.lanes["disk"].tier
            reader_plan = TierPlan("disk", 128, make_policy("lru"), is_indexed=True, is_shared=True)
            use(writer, prompt(10))
            assert writer.flush(WAIT_S)
            reader = store_over([(tier, reader_plan)])
            try:
                blocks, match = load(reader, reader.request(prompt(10)))
            finally:
                reader._dispatcher.mover.close(5.0)

        assert blocks == 10
        assert match.by_tier == {"disk": 10}

    def test_what_left_host_memory_comes_from_below(self) -> None:
        tier = memory_tier()
        with store_over([tier], num_slots=8) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=2))
            assert store.flush(WAIT_S)

            blocks, match = load(store, store.request(prompt(8, seed=1)))
            store.check()

        assert blocks == 8
        assert match.by_tier == {"memory": 8}

    def test_a_lookup_asks_a_shared_tier_and_says_so(self) -> None:
        shared = redis_like()
        with store_over([shared]) as store:
            use(store, prompt(4))
            assert store.flush(WAIT_S)
            with_other = store_over([shared])
            try:
                request = with_other.request(prompt(4))
                assert with_other.lookup(request).pending
                assert with_other.wait_lookup(request, 5.0).num_blocks == 4
                assert load(with_other, request)[0] == 4
            finally:
                with_other._dispatcher.mover.close(5.0)

    def test_a_page_that_vanished_below_is_a_miss_and_is_saved_again(self) -> None:
        tier, plan = memory_tier()
        with store_over([(tier, plan)], num_slots=8) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=2))
            assert store.flush(WAIT_S)
            request = store.request(prompt(8, seed=1))
            lost: PageKey = next(page.key for page in tier.scan() if page.key.startswith(request.keys[3]))
            tier.delete([lost], timeout_s=1.0)

            blocks, _ = load(store, request)
            assert blocks == 3
            save(store, request, 3)
            assert load(store, request)[0] == 8
            store.check()

    def test_the_other_tier_is_tried_when_one_lost_the_page(self) -> None:
        first, second = memory_tier(name="first"), memory_tier(name="second")
        with store_over([first, second], num_slots=8) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=2))
            assert store.flush(WAIT_S)
            first[0].delete([page.key for page in first[0].scan()], timeout_s=1.0)

            blocks, _ = load(store, store.request(prompt(8, seed=1)))

        assert blocks == 8

    def test_a_full_disk_keeps_the_heads_of_paths(self) -> None:
        tier = memory_tier(capacity_pages=10)
        with store_over([tier], num_slots=64) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(6, seed=2))
            assert store.flush(WAIT_S)
            keys = {page.key for page in tier[0].scan()}
            old, new = store.request(prompt(8, seed=1)).keys, store.request(prompt(6, seed=2)).keys
            store.check()

        # Each key is its block hash and four bytes of group and shard.
        held = {key[:32] for key in keys}
        assert [key in held for key in new] == [True] * 6
        assert [key in held for key in old] == [True] * 4 + [False] * 4

    def test_pages_of_another_writer_do_not_overfill_the_books(self) -> None:
        tier, plan = memory_tier(capacity_pages=4, is_shared=True)
        reader_plan = replace(plan, policy=make_policy("lru"))
        with store_over([(tier, plan)]) as writer, store_over([(tier, reader_plan)]) as reader:
            for seed in range(3):  # each prompt pushes the one before out of the tier
                use(writer, prompt(4, seed=seed))
                assert writer.flush(WAIT_S)
                assert load(reader, reader.request(prompt(4, seed=seed)))[0] == 4
                assert reader.stats()["pages"]["memory"] == 4
            reader.check()

    def test_a_write_that_failed_is_made_up_for_at_the_next_use(self) -> None:
        inner, plan = memory_tier()
        tier = FaultyTier(inner)
        tier.fail(2, TierFull("no room just now"), only=("write_from",))
        with store_over([(tier, plan)], touch_interval_s=0.0) as store:
            use(store, prompt(4))
            assert store.flush(5.0).missing == {"memory": {"refused": 4}}
            assert len(inner) == 0

            use(store, prompt(4))
            assert store.flush(WAIT_S)

            assert len(inner) == 4
            assert store.stats()["spill_failures"]["memory"] == 8

    def test_what_only_an_asked_tier_has_is_not_remembered_here(self) -> None:
        tier, plan = redis_like()
        with store_over([(tier, plan)], num_slots=8) as store:
            for seed in range(8):
                use(store, prompt(8, seed=seed))
                assert store.flush(WAIT_S)
            store.check()

            assert store.stats()["blocks"] == store.stats()["pages"]["shared"] == 8
            assert load(store, store.request(prompt(8, seed=0)))[0] == 8  # it is asked all the same

    def test_forgetting_reaches_what_is_not_remembered_here(self) -> None:
        tier, plan = redis_like()
        with store_over([(tier, plan)], num_slots=8) as store:
            use(store, prompt(8, seed=0))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)

            store.keep.forget(store.request(prompt(8, seed=0)), 2)
            wait_until(lambda: len(list(tier.scan())) <= 10)

            assert store.wait_lookup(store.request(prompt(8, seed=0)), 5.0).num_blocks == 2

    def test_only_pages_used_again_are_admitted_where_that_is_asked(self) -> None:
        tier = memory_tier(admit="second_use")
        with store_over([tier]) as store:
            use(store, prompt(4))
            store.flush(WAIT_S)
            assert not list(tier[0].scan())

            use(store, prompt(4))
            store.flush(WAIT_S)

            assert len(list(tier[0].scan())) == 4

    def test_a_flushed_shared_tier_is_filled_again_by_the_next_use(self) -> None:
        tier, plan = redis_like()
        with store_over([(tier, plan)], touch_interval_s=0.0) as store:
            use(store, prompt(4))
            assert store.flush(WAIT_S)
            tier.delete([page.key for page in tier.scan()], timeout_s=1.0)

            use(store, prompt(4))
            wait_until(lambda: len(list(tier.scan())) >= 4)

            assert len(list(tier.scan())) == 4


class TestPrefetch:
    def test_prefetched_pages_wait_in_host_memory(self) -> None:
        tier = memory_tier()
        with store_over([tier], num_slots=8) as store:
            use(store, prompt(6, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=2))
            assert store.flush(WAIT_S)
            request = store.request(prompt(6, seed=1))

            store.prefetch(request)
            wait_until(lambda: store.lookup(request).by_tier == {"host": 6})
            store.check()

    def test_a_prefetch_asks_the_shared_tier_first(self) -> None:
        shared = redis_like()
        with store_over([shared]) as store:
            use(store, prompt(4))
            assert store.flush(WAIT_S)
            other = store_over([shared])
            try:
                request = other.request(prompt(4))
                other.prefetch(request)
                wait_until(lambda: other.stats()["slots"]["resident"] >= 4)
                assert other.stats()["slots"]["resident"] == 4
            finally:
                other._dispatcher.mover.close(5.0)

    def test_a_cancelled_prefetch_holds_nothing(self, store: LocalStore) -> None:
        store.cancel(store.prefetch(store.request(prompt(4))))

        assert store.stats()["slots"]["free"] == 64


class TestLoadOrRecompute:
    def test_a_tier_slower_than_computing_is_left_alone(self) -> None:
        tier = memory_tier()
        with store_over([tier], num_slots=8) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(8, seed=2))
            assert store.flush(WAIT_S)
            store.observe_prefill(1_000_000, 0.001)  # an engine that computes a billion tokens a second
            store._planner.books.costs.tiers["memory"].observe(1.0, PAGE_BYTES, time.monotonic())

            match = store.lookup(store.request(prompt(8, seed=1)))

        assert (match.num_blocks, match.known, match.cut) == (0, 8, CutReason.NOT_WORTH)

    def test_it_is_used_again_when_it_has_become_fast(self) -> None:
        tier = memory_tier()
        with store_over([tier], num_slots=16) as store:
            use(store, prompt(8, seed=1))
            assert store.flush(WAIT_S)
            use(store, prompt(16, seed=2))
            assert store.flush(WAIT_S)
            store.observe_prefill(1_000, 1.0)
            store._planner.books.costs.tiers["memory"].observe(100.0, PAGE_BYTES, now=0.0)  # long ago
            request = store.request(prompt(8, seed=1))

            assert store.lookup(request).cut is CutReason.NOT_WORTH  # and a sample is fetched in the background
            wait_until(lambda: not store.stats()["slots"]["filling"])

            assert store.lookup(request).num_blocks > 0
            store.check()


class TestHashesThatMayCollide:
    def test_blocks_are_compared_token_by_token(self, tmp_path: Path) -> None:
        with open_small(tmp_path, store={"hash": "xxh3_128"}) as store:
            use(store, prompt(4))
            request = store.request(prompt(4))
            assert store.lookup(request).num_blocks == 4
            assert request.tokens is not None
            request.tokens[2 * 4 * BLOCK] ^= 1  # as if another prompt had the same hash

            assert store.lookup(request).num_blocks == 2
            assert store.stats()["collisions"]["host"] > 0

    def test_tokens_are_compared_on_what_comes_from_disk(self, tmp_path: Path) -> None:
        with open_small(tmp_path, store={"hash": "xxh3_128"}) as store:
            use(store, prompt(4))
        with open_small(tmp_path, store={"hash": "xxh3_128"}) as store:
            assert load(store, store.request(prompt(4)))[0] == 4


class TestLongPrompts:
    def test_a_long_prompt_of_which_only_the_head_finds_room_keeps_that(self, store: LocalStore) -> None:
        request = store.request(prompt(3000))

        lease = store.prepare_save(request, 0, 3000)

        assert len(lease.pages) == 64
        assert lease.skipped == 3000 - 64
        store.complete(lease)
        assert store.lookup(request).num_blocks == 64
        store.check()

    def test_a_long_prompt_of_which_the_head_is_there_keeps_it(self, store: LocalStore) -> None:
        use(store, prompt(40))
        request = store.request(prompt(3000)[: 40 * BLOCK].tolist() + prompt(2000, seed=3).tolist())

        lease = store.prepare_save(request, 0, 2040)

        assert [page.block for page in lease.pages] == list(range(40, 64))
        store.complete(lease)
        assert store.lookup(request).num_blocks == 64
