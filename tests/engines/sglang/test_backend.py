"""KVStoreBackend below SGLang's real host pools: what one attach has stored, another loads, bit for bit."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageFailureInjector

from kvstore.errors import LayoutMismatch
from tests.engines.sglang.backends import NUM, attached, chain, on_disk, page_bytes, restored, store, tokens
from tests.engines.sglang.pools import LAYOUTS, host_pool, mla_host_pool
from tests.engines.sglang.updates import Weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_come_back_bit_for_bit_after_a_restart(layout: str, tmp_path: Path) -> None:
    pool = host_pool(layout)
    store(pool, on_disk(tmp_path))
    before = page_bytes(pool, 0, NUM)

    assert restored(pool, on_disk(tmp_path)) == (NUM, [True] * NUM)

    assert page_bytes(pool, 20, NUM) == before
    assert page_bytes(pool, 0, NUM) == before


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "page_head"])
def test_latent_pages_come_back_bit_for_bit(layout: str, tmp_path: Path) -> None:
    pool = mla_host_pool(layout)
    store(pool, on_disk(tmp_path), is_mla_model=True)
    before = page_bytes(pool, 0, NUM)

    assert restored(pool, on_disk(tmp_path), is_mla_model=True) == (NUM, [True] * NUM)

    assert page_bytes(pool, 20, NUM) == before


# ---- never another's page --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "page_first"])
def test_a_page_of_another_layout_is_a_miss(layout: str, tmp_path: Path) -> None:
    store(host_pool("page_first"), on_disk(tmp_path))
    pool = host_pool(layout)
    before = pool.kv_buffer.clone()

    assert restored(pool, on_disk(tmp_path)) == (0, [False] * NUM)

    assert torch.equal(pool.kv_buffer, before)


def test_a_page_of_another_element_type_of_the_same_size_is_a_miss(tmp_path: Path) -> None:
    store(host_pool("page_first", torch.bfloat16), on_disk(tmp_path))

    assert restored(host_pool("page_first", torch.float16), on_disk(tmp_path)) == (0, [False] * NUM)


def test_a_directory_of_pages_of_another_size_is_refused_with_a_sentence(tmp_path: Path) -> None:
    store(host_pool("page_first", torch.bfloat16), on_disk(tmp_path))

    with pytest.raises(LayoutMismatch), attached(host_pool("page_first", torch.float8_e4m3fn), on_disk(tmp_path)):
        pass


def test_a_page_of_other_weights_is_a_miss(tmp_path: Path) -> None:
    pool = host_pool("page_first")
    store(pool, on_disk(tmp_path))

    assert restored(pool, on_disk(tmp_path, weights="tiny v2")) == (0, [False] * NUM)


@pytest.mark.parametrize("other", [{"tp_rank": 1}, {"tp_size": 4}, {"pp_size": 2}, {"attn_cp_size": 2}])
def test_a_page_of_another_rank_is_a_miss(other: dict[str, int], tmp_path: Path) -> None:
    pool, two = host_pool("page_first"), {"tp_size": 2}
    store(pool, on_disk(tmp_path), **two)

    assert restored(pool, on_disk(tmp_path), **two | other) == (0, [False] * NUM)
    assert restored(pool, on_disk(tmp_path), **two) == (NUM, [True] * NUM)


def test_after_an_update_of_the_weights_everything_is_a_miss_and_nothing_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, keys, weights = host_pool("page_first"), chain(NUM), Weights(monkeypatch)
    with attached(pool, on_disk(tmp_path)) as backend:
        backend.batch_set_v1(keys, tokens(0, NUM))
        weights.update("v2")

        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys, tokens(20, NUM)) == [False] * NUM
        assert backend.batch_set_v1(keys, tokens(0, NUM)) == [False] * NUM
    with attached(pool, on_disk(tmp_path)) as backend:  # attached again: the weights are still others
        assert backend.batch_exists(keys) == 0


def test_updates_that_are_vouched_for_make_pages_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, keys, weights = host_pool("page_first"), chain(NUM), Weights(monkeypatch)
    before = page_bytes(pool, 6, NUM)
    with attached(pool, on_disk(tmp_path, updates_by_name=True)) as backend:
        backend.batch_set_v1(keys, tokens(0, NUM))
        weights.update("v2", flush=False)
        assert backend.batch_set_v1(keys, tokens(0, NUM)) == [False] * NUM  # of the weights before
        weights.update("v2")

        assert backend.batch_exists(keys) == 0
        assert backend.batch_set_v1(keys, tokens(6, NUM)) == [True] * NUM
        assert backend.batch_get_v1(keys, tokens(20, NUM)) == [True] * NUM
    assert page_bytes(pool, 20, NUM) == before


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_two_ranks_at_once_have_a_directory_together_and_pages_each(tmp_path: Path) -> None:
    pools, keys = [host_pool("page_first", seed=rank) for rank in (0, 1)], chain(NUM)
    before = [page_bytes(pool, 0, NUM) for pool in pools]
    with (
        attached(pools[0], on_disk(tmp_path), tp_rank=0, tp_size=2) as first,
        attached(pools[1], on_disk(tmp_path), tp_rank=1, tp_size=2) as second,
    ):
        for backend in (first, second):
            assert backend.batch_set_v1(keys, tokens(0, NUM)) == [True] * NUM
        for backend in (second, first):
            assert backend.batch_get_v1(keys, tokens(20, NUM)) == [True] * NUM

    assert [page_bytes(pool, 20, NUM) for pool in pools] == before


def test_latent_pages_are_written_by_rank_0_and_read_by_all(tmp_path: Path) -> None:
    pools, keys = [mla_host_pool("page_first", seed=rank) for rank in (0, 1)], chain(NUM)
    before = page_bytes(pools[0], 0, NUM)
    with (
        attached(pools[0], on_disk(tmp_path), tp_rank=0, tp_size=2, is_mla_model=True) as writer,
        attached(pools[1], on_disk(tmp_path), tp_rank=1, tp_size=2, is_mla_model=True) as reader,
    ):
        assert reader.batch_set_v1(keys, tokens(0, NUM)) == [True] * NUM
        assert writer.batch_exists(keys) == 0

        writer.batch_set_v1(keys, tokens(0, NUM))

        assert reader.batch_exists(keys) == NUM
        assert reader.batch_get_v1(keys, tokens(20, NUM)) == [True] * NUM

    assert page_bytes(pools[1], 20, NUM) == before


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_under_sglangs_own_delays_and_failures_what_is_said_to_come_is_right(tmp_path: Path) -> None:
    pool, keys = host_pool("page_first"), chain(32)
    before, told = page_bytes(pool, 0, 32), []
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.01),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
        attached(pool, on_disk(tmp_path)) as backend,
    ):
        assert isinstance(backend, HiCacheStorageFailureInjector)
        for first in range(0, 32, 4):
            backend.batch_set_v1(keys[first : first + 4], tokens(first, 4))
        for first in range(0, 32, 4):
            pool.kv_buffer[:, (32 + first) * pool.page_size : (36 + first) * pool.page_size] = 0
            told += backend.batch_get_v1(keys[first : first + 4], tokens(32 + first, 4))

    after = page_bytes(pool, 32, 32)
    assert any(told)
    assert not all(told)
    assert [page for page, is_ok in zip(after, told, strict=True) if is_ok] == [
        page for page, is_ok in zip(before, told, strict=True) if is_ok
    ]


def test_a_corrupted_page_is_a_miss_and_leaves_the_rest(tmp_path: Path) -> None:
    pool = host_pool("page_first")
    store(pool, on_disk(tmp_path))
    needle = page_bytes(pool, 2, 1)[0][:64]
    (slab,) = [file for file in tmp_path.rglob("*") if file.is_file() and needle in file.read_bytes()]
    with slab.open("r+b") as file:
        file.seek(slab.read_bytes().index(needle))
        file.write(bytes(64))

    found, ok = restored(pool, on_disk(tmp_path))

    assert (found, ok) == (NUM, [True, True, False, True, True, True])


def write_for_ever(folder: Path, told: int) -> None:
    with attached(host_pool("page_first"), on_disk(folder)) as backend:
        backend.batch_set_v1(chain(NUM), tokens(0, NUM))
        os.write(told, b"stored")
        for seed in itertools.count(1):
            backend.batch_set_v1(chain(NUM, seed=seed), tokens(0, NUM))


def test_what_was_stored_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    reader, told = os.pipe()
    writer = os.fork()  # a process of its own would import SGLang for a minute
    if not writer:
        try:
            write_for_ever(tmp_path, told)
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(reader, 6) == b"stored"
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        os.close(reader)
    pool = host_pool("page_first")
    before = page_bytes(pool, 0, NUM)

    assert restored(pool, on_disk(tmp_path)) == (NUM, [True] * NUM)

    assert page_bytes(pool, 20, NUM) == before


def test_after_the_end_everything_is_a_miss_and_nothing_is_raised(tmp_path: Path) -> None:
    pool, keys = host_pool("page_first"), chain(NUM)
    with attached(pool, on_disk(tmp_path)) as backend:
        backend.close()

        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys, tokens(0, NUM)) == [False] * NUM
        assert backend.batch_set_v1(keys, tokens(0, NUM)) == [False] * NUM


def test_indices_that_do_not_fit_are_a_miss(tmp_path: Path) -> None:
    pool, keys = host_pool("page_first"), chain(NUM)
    with attached(pool, on_disk(tmp_path)) as backend:
        assert backend.batch_set_v1(keys, tokens(0, NUM - 1)) == [False] * NUM
        assert backend.batch_get_v1(keys, tokens(0, NUM - 1)) == [False] * NUM


def test_clear_deletes_what_is_stored(tmp_path: Path) -> None:
    pool, keys = host_pool("page_first"), chain(NUM)
    with attached(pool, on_disk(tmp_path)) as backend:
        backend.batch_set_v1(keys, tokens(0, NUM))

        backend.clear()

        assert backend.batch_exists(keys) == 0
