"""A tiny random model of every causal language model that the installed transformers has, where one can be made.

Sizes are set by name wherever a config has such a field; what needs more is listed. A multimodal model is left to its
text model, which has a type of its own.
"""

from __future__ import annotations

from typing import Any

VOCAB = 256
WINDOW = 40
CHUNKED = 48
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": CHUNKED,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 2048,
    "n_inner": 96,
    "ffn_dim": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
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
    "num_experts": 4,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 32,
    "moe_num_experts": 4,
    "moe_k": 2,
    "embedding_size": 64,
    "num_layers": 2,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 96,
    "d_kv": 16,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "greedy"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": _PLAIN_ROPE,
    "hunyuan_v1_moe": _PLAIN_ROPE,
    "ministral": _PLAIN_ROPE,
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": None, "intermediate_size": 96},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 16},
}
_FOR_DECODING = {"is_decoder": True, "add_cross_attention": False}


def causal_types() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str, **more: Any) -> Any:
    """A config of this type with small sizes. Whatever transformers raises where it does not fit together."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    fields = {name: value for name, value in _SIZES.items() if known.get(name) is not None or name == "pad_token_id"}
    if "qk_rope_head_dim" in known:
        fields |= _MLA
    fields |= {name: value for name, value in _FOR_DECODING.items() if name in known and not known[name]}
    return kind(**{**fields, **_MORE.get(model_type, {}), **more})


def small_model(model_type: str, **more: Any) -> Any:
    """A random model of this type in eval mode. Raises ValueError for one that stays large whatever its config says."""
    import torch
    import transformers

    config = small_config(model_type, **more)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > 30e6:
        raise ValueError(f"it has {size} parameters")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
