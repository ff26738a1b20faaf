"""Tiny models with random weights, as Hugging Face directories that vLLM loads: one per kind of attention, one that
sees images, and LoRA adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 2048
KINDS = ("gqa", "sliding", "mla", "image")
IMAGE_SIDE = 32  # pixels
_IMAGE_TOKENS = 8
_WIDTH = {"gqa": 1.6, "sliding": 1.0, "mla": 1.0, "image": 1.6}


def make_model(target: Path, kind: str = "gqa", *, seed: int = 0, **changes: Any) -> Path:
    """Write a model of `kind` into `target` (made if absent) and return it; the same seed makes the same weights.

    changes: of the configuration, by its own names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    target.mkdir(parents=True, exist_ok=True)
    if (target / "model.safetensors").is_file():
        return target
    config = AutoConfig.for_model(**{**_configs()[kind], **changes})
    torch.manual_seed(seed)
    family = AutoModelForImageTextToText if kind == "image" else AutoModelForCausalLM
    model = family.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            # Wider than usual, so that attention is peaked and the tokens really depend on the prefix.
            if weights.ndim == 2 and "embed" not in name:
                weights.normal_(0, _WIDTH[kind] * weights.shape[1] ** -0.5)
    model.save_pretrained(target)
    _write_tokenizer(target, ["<image>"] if kind == "image" else [])
    if kind == "image":
        _write_image_processor(target)
    return target


def make_adapter(target: Path, seed: int) -> Path:
    """Write a LoRA adapter for the "gqa" model into `target` and return it; another seed makes other weights."""
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    numbers = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        for name, rows in (("q_proj", 256), ("v_proj", 128)):
            head = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (8, 256)), ("lora_B", (rows, 8))):
                noise = torch.randn(shape, generator=numbers) * 0.3
                weights[f"{head}.{part}.weight"] = noise.to(torch.bfloat16)
    save_file(weights, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    (target / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
    return target


def _configs() -> dict[str, dict[str, Any]]:
    common = {"vocab_size": VOCAB, "max_position_embeddings": 16384, "tie_word_embeddings": False}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    sliding = {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    }
    mla = {
        "model_type": "deepseek_v2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": 64,
        "first_k_dense_replace": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        # As DeepSeek's own models have it. Plain rotary positions come out wrong in vLLM 0.32 on CPU: docs/vllm.md.
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    }
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {
        "model_type": "blip-2",
        "text_config": {**common, **ids, **llama, "vocab_size": VOCAB + 16},
        "vision_config": {**vision, "image_size": IMAGE_SIDE, "patch_size": 8},
        "qformer_config": {**vision, "vocab_size": VOCAB, "encoder_hidden_size": 64},
        "num_query_tokens": _IMAGE_TOKENS,
        "image_token_index": VOCAB,
        "tie_word_embeddings": False,
    }
    kinds = {name: {**common, **ids, **own} for name, own in (("gqa", llama), ("sliding", sliding), ("mla", mla))}
    return {**kinds, "image": image}


def _write_image_processor(target: Path) -> None:
    images = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    settings = {"processor_class": "Blip2Processor", "num_query_tokens": _IMAGE_TOKENS}
    (target / "preprocessor_config.json").write_text(json.dumps({**images, "processor_class": "Blip2Processor"}))
    (target / "processor_config.json").write_text(json.dumps(settings))


def _write_tokenizer(target: Path, special: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    while len(vocabulary) < VOCAB:
        vocabulary[f"<x{len(vocabulary)}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 16384,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
