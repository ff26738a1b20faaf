"""Device and host pools of a small made-up model, in each of SGLang's layouts."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
LAYERS, HEADS, HEAD_DIM = 4, 2, 64
PAGE = 16  # tokens
TOKENS = 1024  # of the device pool


def device_pool(dtype: torch.dtype = torch.bfloat16, page: int = PAGE, tokens: int = TOKENS) -> Any:
    """Keys and values of LAYERS layers, on the "device" CPU."""
    return MHATokenToKVPool(
        size=tokens,
        page_size=page,
        dtype=dtype,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def host_pool(layout: str, dtype: torch.dtype = torch.bfloat16, page: int = PAGE, tokens: int = TOKENS) -> Any:
    """SGLang's host memory for twice the device's tokens, filled with random bytes that are all finite."""
    device = device_pool(dtype, page, tokens)
    pool = MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        2.0,
        0,
        page,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=tokens,
        start_layer=0,
        end_layer=LAYERS,
    )
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=torch.Generator().manual_seed(7)).to(dtype))
    return pool
