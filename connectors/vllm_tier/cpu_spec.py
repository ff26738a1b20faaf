"""vLLM's tiered offloading for CPU engines, which vLLM itself refuses there.

    "spec_name": "CpuTieringSpec", "spec_module_path": "connectors.vllm_tier"    (instead of TieringOffloadingSpec)

Only the worker is ours; vLLM's copies with CUDA streams. The rest (scheduler, host memory, tiers, metrics) is vLLM's,
untouched. On an engine without a GPU "device memory" is memory too, so a copy is done when `submit_*` returns:
nothing has to be held, and a block may be overwritten right after.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vllm
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from connectors.vllm import versions
from kvstore.errors import ConfigError

Bytes2D = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor's share of a block: where it lies in the engine, and in a chunk.

    engine: [blocks, page bytes].
    host:   [chunks, page bytes x blocks of a chunk].
    used:   bytes of a page that carry data.
    """

    engine: Bytes2D
    host: Bytes2D
    used: int


class HostCopyWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM's classes are untyped here
    """Copies blocks between the engine's tensors and vLLM's host memory, at once. One thread.

    blocks_per_chunk: blocks that lie one after the other in a chunk.
    """

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._done: list[TransferResult] = []
        engine, host, pages = [], [], []
        for tensor in kv_caches.tensors:
            if tensor.tensor.device.type != "cpu":
                raise ConfigError(
                    f"CpuTieringSpec: the KV cache is on {tensor.tensor.device}; use spec_name TieringOffloadingSpec"
                )
            page = int(tensor.page_size_bytes)
            pages.append(page)
            engine.append(tensor.tensor.view(torch.int8).view(-1, page).numpy())
            host.append(region.create_next_worker_view(page * blocks_per_chunk).numpy())
        self._pages = pages
        self._groups = [
            [_Piece(engine[ref.tensor_idx], host[ref.tensor_idx], int(ref.page_size_bytes)) for ref in refs]
            for refs in kv_caches.group_data_refs
        ]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Engine blocks -> chunks."""
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        """Chunks -> engine blocks. expedited: vLLM 0.33 waits for it within the step; here that is always so."""
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def get_finished(self) -> list[TransferResult]:
        """Everything submitted since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Return at once."""

    def shutdown(self) -> None:
        """Free the host memory. Idempotent."""
        self._groups = []
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _copy(self, job_id: int, engine_spec: Any, host_spec: Any, *, is_store: bool) -> bool:
        began = time.perf_counter()
        num_bytes = 0
        for pieces, blocks, chunks, first in self._by_group(engine_spec, host_spec):
            for piece in pieces:
                page = piece.engine.shape[1]
                for i, block in enumerate(blocks):
                    chunk, within = divmod(first + i, self._blocks_per_chunk)
                    inside = piece.engine[block, : piece.used]
                    outside = piece.host[chunks[chunk], within * page : within * page + piece.used]
                    np.copyto(outside, inside) if is_store else np.copyto(inside, outside)
                num_bytes += len(blocks) * piece.used
        seconds = time.perf_counter() - began
        self._done.append(TransferResult(job_id=job_id, success=True, transfer_size=num_bytes, transfer_time=seconds))
        return True

    def _by_group(self, engine_spec: Any, host_spec: Any) -> list[tuple[list[_Piece], list[int], list[int], int]]:
        """Per layer group: its pieces, blocks, chunks, and the place of the first block in the first chunk."""
        parts = []
        blocks, chunks = _ints(engine_spec.block_ids), _ints(host_spec.block_ids)
        for pieces, size, index in zip(self._groups, engine_spec.group_sizes, engine_spec.block_indices, strict=True):
            first = int(index) % self._blocks_per_chunk
            num_chunks = -(-(first + size) // self._blocks_per_chunk) if size else 0
            parts.append((pieces, blocks[:size], chunks[:num_chunks], first))
            blocks, chunks = blocks[size:], chunks[num_chunks:]
        if blocks or chunks:
            raise ValueError(f"offloading: {len(blocks)} blocks and {len(chunks)} chunks belong to no group")
        return parts


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """TieringOffloadingSpec for engines on the CPU. Raises ConfigError for what it cannot do."""

    _worker: HostCopyWorker | None

    def __init__(self, config: Any) -> None:
        versions.check_version(vllm.__version__)
        if config.canonical_layout:
            raise ConfigError("CpuTieringSpec: canonical_layout is on; a CPU engine's blocks are packed, leave it off")
        # Reads every tier's entry: what is wrong there must stop the engine before host memory has a file in /dev/shm.
        self.build_metric_definitions(dict(config.extra_config))
        super().__init__(config)

    def get_worker(self, kv_caches: Any) -> HostCopyWorker:
        """The worker; vLLM's own refuses every platform but GPUs."""
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def create_worker(self, kv_caches: Any) -> HostCopyWorker:
        """Map the engine's host memory and copy to and from it."""
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            return HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
        except BaseException:
            region.cleanup()
            raise


def _ints(values: Sequence[int] | npt.NDArray[np.int32]) -> list[int]:
    return [int(value) for value in values]
