"""The KV of a model, and what its prefill costs by position: facts of its config.json, and arithmetic.

    bytes of a token    2 x layers x kv heads x head dim x bytes of a number (MLA: layers x (latent + rope) x bytes)
    prefill of token p  2 x active parameters + 4 x layers x heads x head dim x p  floating-point operations

A layer with a sliding window looks back no further than that, and a linear layer nowhere: they add to the first term
alone. Pages of windowed layers are stored for every block, since any block can be where a prompt resumes; only the last
window of them is loaded. The state of linear layers is loaded once for a prompt; the room that it takes in a store is
not in the bytes of a token.

Presets are the fields of the models' published configurations: Meta-Llama-3-8B and 70B and Qwen3-32B of their
config.json; DeepSeek-V3, gpt-oss-120b and Qwen3-Next-80B-A3B of those and of the defaults of transformers'
DeepseekV3Config, GptOssConfig and Qwen3NextConfig, which are the same; gpt-oss-20b of its config.json (24 layers).
Active parameters are those of the DeepSeek-V3 report (37B), the README of openai/gpt-oss (5.1B, 3.6B) and the name of
Qwen3-Next (A3B). KV has 2 bytes a number, as served in bf16; for fp8 give --bytes-per-token. The state of linear layers
has 4, as transformers keeps it, and the tail of their convolution 2: engines differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError

# Fields of models of which read_geometry cannot tell the bytes or the cost.
UNREAD = ("kv_lora_rank", "num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """One model.

    active:       parameters that a token goes through.
    layers:       with attention to all that came before. windowed: with a sliding window of `window` tokens.
    token_bytes:  of KV, of one token in all of those layers; window_bytes: the windowed ones' part of it.
    state_bytes:  of linear layers, once for a prompt.
    position_flops: of attention in one full layer, for each token before.
    """

    name: str
    active: float
    layers: int
    token_bytes: int
    position_flops: int
    windowed: int = 0
    window: int = 0
    window_bytes: int = 0
    state_bytes: int = 0

    def prefill_flops(self, first: float, end: float) -> float:
        """Floating-point operations of the prefill of tokens [first, end) of a prompt."""
        full = self.layers * self.position_flops * (end * end - first * first) / 2
        seen = _clipped(end, self.window) - _clipped(first, self.window)
        return 2 * self.active * (end - first) + full + self.windowed * self.position_flops * seen


def _clipped(end: float, window: int) -> float:
    """The sum over positions p < end of min(p, window)."""
    return end * end / 2 if end <= window else window * window / 2 + window * (end - window)


def _gqa(
    name: str,
    active: float,
    layers: int,
    heads: int,
    kv: int,
    dim: int,
    windowed: int = 0,
    window: int = 0,
    state: int = 0,
) -> ModelGeometry:
    layer_bytes = 2 * kv * dim * 2  # keys and values, 2 bytes a number
    total = (layers + windowed) * layer_bytes
    return ModelGeometry(name, active, layers, total, 4 * heads * dim, windowed, window, windowed * layer_bytes, state)


PRESETS = {
    model.name: model
    for model in (
        _gqa("llama-3-8b", 8.03e9, 32, 32, 8, 128),
        _gqa("llama-3-70b", 70.6e9, 80, 64, 8, 128),
        _gqa("qwen3-32b", 32.8e9, 64, 64, 8, 128),
        # MLA: a latent of 512 and 64 rotary numbers a layer; 128 heads of 192 (keys) and 128 (values).
        ModelGeometry("deepseek-v3", 37e9, 61, 61 * (512 + 64) * 2, 2 * 128 * (192 + 128)),
        # Every second layer has a window of 128 tokens.
        _gqa("gpt-oss-120b", 5.1e9, 18, 64, 8, 64, windowed=18, window=128),
        _gqa("gpt-oss-20b", 3.6e9, 12, 64, 8, 64, windowed=12, window=128),
        # Every fourth of 48 layers is full attention. A linear one has 32 value heads of 128 x 128 numbers, and of its
        # convolution over 4 tokens the last 3 of 2 x 16 x 128 + 32 x 128 channels.
        _gqa("qwen3-next-80b", 3e9, 12, 16, 2, 256, state=36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)),
    )
}


def find_geometry(name: str) -> ModelGeometry:
    """Return a preset, or what a config.json says. Raises ConfigError, with the list."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return read_geometry(path / "config.json" if path.is_dir() else path)
    raise ConfigError(f"--model is {name!r}; it must be one of {', '.join(PRESETS)}, or the path of a config.json")


def read_geometry(path: Path) -> ModelGeometry:
    """Read the config.json of a dense model with full attention. Raises ConfigError, OSError.

    Others have more to say than this reader knows: give --bytes-per-token beside a preset that is near.
    """
    try:
        fields = json.loads(path.read_text())
        special = [key for key in UNREAD if fields.get(key)]
        special += ["layer_types"] if len(set(fields.get("layer_types") or [])) > 1 else []
        if special:
            raise ConfigError(
                f"{path} has {', '.join(special)}; take the preset that is nearest, with --bytes-per-token"
            )
        layers, heads, hidden = (
            _count(fields, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
        kv = _count(fields, "num_key_value_heads", heads)
        dim = _count(fields, "head_dim", hidden // heads)
        wide, words = _count(fields, "intermediate_size", 4 * hidden), _count(fields, "vocab_size", 1)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the config.json of a model: {error}") from None
    active = layers * (2 * hidden * dim * (heads + kv) + 3 * hidden * wide) + 2 * words * hidden
    return _gqa(path.parent.name or path.name, float(active), layers, heads, kv, dim)


def _count(fields: dict[str, object], key: str, default: int | None = None) -> int:
    value = fields.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a number above 0")
    return value
