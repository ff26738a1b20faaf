"""KVStoreBackend under SGLang's real controller and its threads: attached, written to, prefetched from, detached."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.runtime_context import get_context, get_parallel

from connectors.sglang import KVStoreBackend
from tests.engines.sglang.backends import NUM, chain, on_disk, page_bytes, tokens
from tests.engines.sglang.pools import PAGE, TOKENS, device_pool, host_pool

WAIT_S = 60


def open_controller(pool: Any, extra: dict[str, Any]) -> HiCacheController:
    device = device_pool()
    allocator = PagedTokenToKVPoolAllocator(
        TOKENS, page_size=PAGE, dtype=torch.bfloat16, device="cpu", kvcache=device, need_sort=False
    )
    return HiCacheController(
        allocator,
        pool,
        PAGE,
        tp_group=None,
        load_cache_event=threading.Event(),
        io_backend="direct",
        storage_backend="dynamic",
        model_name="tiny",
        storage_backend_extra_config=dict(extra),
    )


def test_the_controllers_threads_store_and_prefetch_and_a_detached_one_can_be_attached_again(tmp_path: Path) -> None:
    pool, extra, prompt = host_pool("page_first"), on_disk(tmp_path), list(range(NUM * PAGE))
    one_rank = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_dcp_rank": 0, "attn_dcp_size": 1}
    with get_context().override_server_args(model_path="tiny"), get_parallel().override(**one_rank):
        controller = open_controller(pool, extra)
        try:
            assert isinstance(controller.storage_backend, KVStoreBackend)
            assert controller.page_get_func == controller._page_get_zero_copy
            from sglang.srt.managers.cache_controller import get_storage_hash_str

            keys = get_storage_hash_str(prompt, None, page_size=PAGE)
            controller.write_storage(tokens(0, NUM), prompt, keys)
            stored = controller.ack_backup_queue.get(timeout=WAIT_S)
            assert stored.completed_tokens == NUM * PAGE

            controller.detach_storage_backend()
            assert not controller.enable_storage
            controller.attach_storage_backend("dynamic", model_name="tiny", storage_backend_extra_config=dict(extra))

            operation = controller.prefetch("request", prompt)
            found = controller.prefetch_hit_queue.get(timeout=WAIT_S)
            assert found.storage_hit_count == NUM * PAGE
            operation.host_indices = tokens(20, NUM)
            controller.prefetch_buffer.put(operation)
            done = controller.ack_prefetch_queue.get(timeout=WAIT_S)
            assert done.completed_tokens == NUM * PAGE
        finally:
            controller.detach_storage_backend()

    assert page_bytes(pool, 20, NUM) == page_bytes(pool, 0, NUM)
    assert len(chain(NUM)) == len(keys)
