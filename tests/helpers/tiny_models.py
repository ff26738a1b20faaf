"""Random models of each cache shape, small enough that a forward takes milliseconds.

Their text is gibberish; their caches are real. Weights depend on the seed only, so two processes build the same model.
"""

from __future__ import annotations

from typing import Any

VOCAB = 256
MAX_TOKENS = 2048

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    # Wider than the default 0.02, so that logits differ clearly between tokens and a wrong page changes the argmax.
    "initializer_range": 0.2,
}
_MLA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_QWEN_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name -> (class of the config, its arguments). The first seven are the shapes the end-to-end tests use.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa": ("LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "llama_mha": ("LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 4}),
    "llama_mqa": ("LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 1}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 40,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", _MLA),
    "deepseek_v2": ("DeepseekV2Config", _MLA | {"topk_method": "greedy", "head_dim": 8}),
    "mistral": ("MistralConfig", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 40}),
    # The rest is only self-checked: one forward each way.
    "qwen2": ("Qwen2Config", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16} | _QWEN_MOE,
    ),
    "gemma2": (
        "Gemma2Config",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 40},
    ),
    "phi3": ("Phi3Config", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXConfig", {"num_hidden_layers": 2}),
    "gpt2": ("GPT2Config", {"n_layer": 2, "n_positions": MAX_TOKENS}),
    "cohere2": ("Cohere2Config", {"num_hidden_layers": 4, "num_key_value_heads": 2, "sliding_window": 40}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 40,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}

# Models that keep a state: pages for their attention layers, and states taken while passing.
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "FalconH1Config",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 32,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
        }
        | _QWEN_MOE,
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "mamba_chunk_size": 32,
        }
        | _MAMBA2,
    ),
    "bamba": (
        "BambaConfig",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_chunk_size": 32} | _MAMBA2,
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 32,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 32},
    ),
}

# Models that ignore the state in their cache where more than one token follows: found by the check.
IGNORANT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"num_hidden_layers": 2, "state_size": 8}),
    "jamba": (
        "JambaConfig",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
}

# A model whose state is not in its cache: refused by its layout.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 40, "head_dim": 16},
    ),
}


def tiny_config(name: str, **overrides: Any) -> Any:
    """The config of a model named in one of the tables above, with fields replaced by `overrides`."""
    import transformers

    class_name, fields = {**SUPPORTED, **STATEFUL, **IGNORANT, **REFUSED}[name]
    return getattr(transformers, class_name)(**{**_COMMON, **fields, **overrides})


def tiny_model(name: str, dtype: str = "float32", *, seed: int = 0, **overrides: Any) -> Any:
    """A random model in eval mode, on the CPU, with the attention transformers chooses."""
    import torch
    import transformers

    config = tiny_config(name, **overrides)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    """A prompt of `num_tokens` ids below VOCAB."""
    import numpy as np

    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, num_tokens).tolist()
    return ids
