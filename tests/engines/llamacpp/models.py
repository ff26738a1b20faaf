"""Tiny models with random weights and SmolLM2's tokenizer, of kinds whose states are not one row for each token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEADS, HEAD_DIM, INNER, LAYERS, WINDOW = 64, 2, 32, 96, 6, 64
KERNEL, STATES = 4, 16  # of a convolution, of a recurrent layer

Add = Callable[..., None]


def make_sliding_model(tokenizer_of: Path, path: Path) -> Path:
    """Write a Gemma 3 to `path`, with the tokenizer of another GGUF file: most layers look back 64 tokens."""
    writer, add = _begin(tokenizer_of, path, "gemma3")
    _add_attention_keys(writer, 1)
    writer.add_sliding_window(WINDOW)
    add("output_norm", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"{block}.{norm}", WIDTH)
        _add_attention(add, block)
        _add_mlp(add, block)
    return _end(writer, path)


def make_recurrent_model(tokenizer_of: Path, path: Path) -> Path:
    """Write a Mamba to `path`: no layer has rows, each has one state."""
    writer, add = _begin(tokenizer_of, path, "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    inner, rank = 2 * WIDTH, 8
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(STATES)
    writer.add_ssm_time_step_rank(rank)
    add("output_norm", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", WIDTH)
        add(f"{block}.ssm_in", 2 * inner, WIDTH)
        add(f"{block}.ssm_conv1d", inner, KERNEL)
        add(f"{block}.ssm_conv1d", inner, part="bias")
        add(f"{block}.ssm_x", rank + 2 * STATES, inner)
        add(f"{block}.ssm_dt", inner, rank)
        add(f"{block}.ssm_dt", inner, part="bias")
        writer.add_tensor(f"{block}.ssm_a", -np.ones((inner, STATES), np.float32))
        writer.add_tensor(f"{block}.ssm_d", np.ones(inner, np.float32))
        add(f"{block}.ssm_out", WIDTH, inner)
    return _end(writer, path)


def make_hybrid_model(tokenizer_of: Path, path: Path) -> Path:
    """Write an LFM2 to `path`: every second layer has rows, the others the state of a convolution."""
    writer, add = _begin(tokenizer_of, path, "lfm2")
    _add_attention_keys(writer, [layer % 2 for layer in range(LAYERS)])
    writer.add_shortconv_l_cache(KERNEL - 1)
    add("token_embd_norm", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", WIDTH)
        add(f"{block}.ffn_norm", WIDTH)
        _add_mlp(add, block)
        if layer % 2:
            _add_attention(add, block)
        else:
            add(f"{block}.shortconv.conv", WIDTH, KERNEL - 1)
            add(f"{block}.shortconv.in_proj", 3 * WIDTH, WIDTH)
            add(f"{block}.shortconv.out_proj", WIDTH, WIDTH)
    return _end(writer, path)


# ---- private ---------------------------------------------------------------------------------------------------


def _begin(tokenizer_of: Path, path: Path, architecture: str) -> tuple[Any, Add]:
    import gguf

    reader = gguf.GGUFReader(tokenizer_of)
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_layer_norm_rms_eps(1e-6)
    random = np.random.default_rng(7)

    def add(name: str, *shape: int, part: str = "weight") -> None:
        writer.add_tensor(f"{name}.{part}", (random.standard_normal(shape) * 0.3).astype(np.float32))

    add("token_embd", len(reader.fields["tokenizer.ggml.tokens"].data), WIDTH)
    return writer, add


def _end(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_attention_keys(writer: Any, kv_heads: int | list[int]) -> None:
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e4)


def _add_attention(add: Add, block: str) -> None:
    add(f"{block}.attn_q_norm", HEAD_DIM)
    add(f"{block}.attn_k_norm", HEAD_DIM)
    add(f"{block}.attn_q", HEADS * HEAD_DIM, WIDTH)
    add(f"{block}.attn_k", HEAD_DIM, WIDTH)
    add(f"{block}.attn_v", HEAD_DIM, WIDTH)
    add(f"{block}.attn_output", WIDTH, HEADS * HEAD_DIM)


def _add_mlp(add: Add, block: str) -> None:
    add(f"{block}.ffn_gate", INNER, WIDTH)
    add(f"{block}.ffn_up", INNER, WIDTH)
    add(f"{block}.ffn_down", WIDTH, INNER)
