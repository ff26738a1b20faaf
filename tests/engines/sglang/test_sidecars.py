"""Pools that go with keys and values: SGLang's v2 calls over two real host pools."""

from __future__ import annotations

from pathlib import Path

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from tests.engines.sglang.backends import NUM, attached, chain, on_disk, page_bytes, tokens
from tests.engines.sglang.pools import PAGE, host_pool, mla_host_pool


def test_pages_of_two_pools_come_back_each_to_its_own(tmp_path: Path) -> None:
    pool, draft, keys = host_pool("page_first"), mla_host_pool("page_first"), chain(NUM)
    before = page_bytes(pool, 0, NUM), page_bytes(draft, 0, NUM)
    both = [
        PoolTransfer(PoolName.KV, host_indices=tokens(0, NUM), keys=keys),
        PoolTransfer(PoolName.DRAFT, host_indices=tokens(0, NUM), keys=keys),
    ]
    with attached(pool, on_disk(tmp_path), {"draft": draft}) as backend:
        assert backend.batch_set_v2(both) == {"kv": [True] * NUM, "draft": [True] * NUM}

    for transfer in both:
        transfer.host_indices = tokens(20, NUM)
    with attached(pool, on_disk(tmp_path), {"draft": draft}) as backend:
        assert backend.batch_get_v2(both) == {"kv": [True] * NUM, "draft": [True] * NUM}

    assert (page_bytes(pool, 20, NUM), page_bytes(draft, 20, NUM)) == before


def test_the_usable_prefix_is_what_all_pools_have(tmp_path: Path) -> None:
    pool, window, keys = host_pool("page_first"), mla_host_pool("page_first"), chain(NUM)
    with attached(pool, on_disk(tmp_path), {"swa": window}) as backend:
        backend.batch_set_v1(keys, tokens(0, NUM))
        backend.batch_set_v2([PoolTransfer(PoolName.SWA, host_indices=tokens(2, 2), keys=keys[2:4])])

        trailing = PoolTransfer(PoolName.SWA, keys=keys[:2], hit_policy=PoolHitPolicy.TRAILING_PAGES)
        whole = PoolTransfer(PoolName.SWA, hit_policy=PoolHitPolicy.ALL_PAGES)
        found, none = backend.batch_exists_v2(keys, [trailing]), backend.batch_exists_v2(keys, [whole])

    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [4])
    assert found.extra_pool_hit_pages == {"kv": NUM, "swa": 4}
    assert (none.kv_hit_pages, none.restorable_prefix_pages) == (0, [])


def test_a_pool_that_comes_after_the_start_is_stored_where_its_pages_fit(tmp_path: Path) -> None:
    pool, draft, keys = host_pool("page_first"), mla_host_pool("page_first"), chain(NUM)
    before = page_bytes(draft, 0, NUM)
    with attached(pool, on_disk(tmp_path)) as backend:
        assert backend.batch_exists_v2(keys, [PoolTransfer(PoolName.DRAFT)]).kv_hit_pages == 0
        backend.register_mem_host_pool_v2(draft, PoolName.DRAFT)
        backend.register_mem_host_pool_v2(host_pool("page_first", page=2 * PAGE), PoolName.DRAFT_SWA)  # too long
        draft_pages = PoolTransfer(PoolName.DRAFT, host_indices=tokens(0, NUM), keys=keys)

        assert backend.batch_set_v2([draft_pages]) == {"draft": [True] * NUM}
        backend.batch_set_v1(keys, tokens(0, NUM))
        assert backend.batch_exists_v2(keys, [PoolTransfer(PoolName.DRAFT)]).kv_hit_pages == NUM
        assert backend.batch_exists_v2(keys, [PoolTransfer(PoolName.DRAFT_SWA)]).kv_hit_pages == 0
        draft_pages.host_indices = tokens(20, NUM)
        assert backend.batch_get_v2([draft_pages]) == {"draft": [True] * NUM}

    assert page_bytes(draft, 20, NUM) == before
