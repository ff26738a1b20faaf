"""Device and host pools of a small made-up model, in each of SGLang's layouts."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

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


def host_pool(
    layout: str, dtype: torch.dtype = torch.bfloat16, page: int = PAGE, tokens: int = TOKENS, seed: int = 7
) -> Any:
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
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    return pool


def mla_host_pool(layout: str, seed: int = 7) -> Any:
    """Host memory of latent attention, whose bytes are the same on each rank of a real model."""
    device = MLATokenToKVPool(
        size=TOKENS,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    pool = MLATokenToKVPoolHost(
        device._mla_buffer_info(),
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=torch.Generator().manual_seed(seed)))
    return pool
