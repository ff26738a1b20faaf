"""The copies of CpuTieringSpec, with a made-up region and no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from connectors.vllm_tier.cpu_spec import CpuTieringSpec, HostCopyWorker
from kvstore.errors import ConfigError

PAGE = 64
USED = 48  # of a page; the rest is padding


class Region:
    """Host memory of 8 chunks, the tensors of a chunk side by side."""

    def __init__(self, chunk_bytes: int) -> None:
        self.memory = torch.zeros((8, chunk_bytes), dtype=torch.int8)
        self.used = 0
        self.is_open = True

    def create_next_worker_view(self, page_bytes: int) -> torch.Tensor:
        view = self.memory[:, self.used : self.used + page_bytes]
        self.used += page_bytes
        return view

    def cleanup(self) -> None:
        self.is_open = False


def make(blocks_per_chunk: int) -> tuple[HostCopyWorker, list[torch.Tensor], Region]:
    """Two groups of two layers over two tensors of 10 blocks; block b of tensor t is filled with 10 t + b."""
    tensors = [torch.stack([torch.full((PAGE,), 10 * t + b, dtype=torch.int8) for b in range(10)]) for t in range(2)]
    caches = CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(tensor, PAGE) for tensor in tensors],
        group_data_refs=[[CanonicalKVCacheRef(t, USED) for t in range(2)] for _ in range(2)],
    )
    region = Region(2 * PAGE * blocks_per_chunk)
    return HostCopyWorker(caches, blocks_per_chunk, region), tensors, region


def engine_blocks(blocks: list[int], sizes: list[int], first: list[int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=first)


def test_blocks_of_both_groups_go_to_their_chunks() -> None:
    worker, _, region = make(1)

    assert worker.submit_store(1, engine_blocks([3, 4, 7], [2, 1], [0, 5]), CPULoadStoreSpec([5, 6, 2]))

    (done,) = worker.get_finished()
    assert (done.job_id, done.success, done.transfer_size) == (1, True, 3 * 2 * USED)
    assert [region.memory[chunk, 0].item() for chunk in (5, 6, 2)] == [3, 4, 7]
    assert [region.memory[chunk, PAGE].item() for chunk in (5, 6, 2)] == [13, 14, 17]
    assert region.memory[5, USED].item() == 0  # padding is not copied
    assert worker.get_finished() == []


def test_what_was_stored_comes_back_to_other_blocks() -> None:
    worker, tensors, _ = make(1)
    worker.submit_store(1, engine_blocks([3, 4], [2, 0], [0, 0]), CPULoadStoreSpec([5, 6]))

    worker.submit_load(2, CPULoadStoreSpec([6, 5]), engine_blocks([8, 9], [2, 0], [0, 0]))

    assert [tensors[0][block, 0].item() for block in (8, 9)] == [4, 3]
    assert [tensors[1][block, 0].item() for block in (8, 9)] == [14, 13]
    assert tensors[0][8, USED].item() == 8


def test_a_load_may_begin_in_the_middle_of_a_chunk() -> None:
    worker, tensors, _ = make(4)
    worker.submit_store(1, engine_blocks([0, 1, 2, 3, 4, 5, 6, 7], [8, 0], [0, 0]), CPULoadStoreSpec([1, 2]))
    for tensor in tensors:
        tensor.zero_()

    # blocks 2..5 of the request: two in the first chunk, two in the second
    worker.submit_load(2, CPULoadStoreSpec([1, 2]), engine_blocks([9, 8, 7, 6], [4, 0], [2, 0]))

    assert [tensors[0][block, 0].item() for block in (9, 8, 7, 6)] == [2, 3, 4, 5]
    assert tensors[0][:6].any().item() is False


def test_blocks_without_a_group_are_an_error_and_not_a_wrong_copy() -> None:
    worker, _, region = make(1)

    with pytest.raises(ValueError, match="belong to no group"):
        worker.submit_store(1, engine_blocks([3], [1, 0], [0, 0]), CPULoadStoreSpec([5, 6]))
    assert not region.memory.any()


def test_shutdown_lets_go_of_the_region() -> None:
    worker, _, region = make(1)

    worker.shutdown()
    worker.shutdown()

    assert not region.is_open


def test_a_canonical_layout_is_refused() -> None:
    config: Any = SimpleNamespace(canonical_layout=True)

    with pytest.raises(ConfigError, match="canonical_layout"):
        CpuTieringSpec(config)
