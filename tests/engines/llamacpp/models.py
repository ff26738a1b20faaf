"""A tiny Gemma 3 with random weights and SmolLM2's tokenizer: four layers, of which three look back 64 tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, HEADS, HEAD_DIM, INNER, LAYERS, WINDOW = 64, 2, 32, 96, 6, 64


def make_sliding_model(tokenizer_of: Path, path: Path) -> Path:
    """Write the model to `path`, with the tokenizer of another GGUF file."""
    import gguf

    reader = gguf.GGUFReader(tokenizer_of)
    writer = gguf.GGUFWriter(path, "gemma3")
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(WINDOW)
    writer.add_rope_freq_base(1e4)
    random = np.random.default_rng(7)
    words = len(reader.fields["tokenizer.ggml.tokens"].data)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.3).astype(np.float32))

    add("token_embd", words, WIDTH)
    add("output_norm", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"{block}.{norm}", WIDTH)
        add(f"{block}.attn_q_norm", HEAD_DIM)
        add(f"{block}.attn_k_norm", HEAD_DIM)
        add(f"{block}.attn_q", HEADS * HEAD_DIM, WIDTH)
        add(f"{block}.attn_k", HEAD_DIM, WIDTH)
        add(f"{block}.attn_v", HEAD_DIM, WIDTH)
        add(f"{block}.attn_output", WIDTH, HEADS * HEAD_DIM)
        add(f"{block}.ffn_gate", INNER, WIDTH)
        add(f"{block}.ffn_up", INNER, WIDTH)
        add(f"{block}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
