"""Length limits, as configs state them."""

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.transformers.positions import max_tokens, steady_tokens
from tests.helpers.tiny_models import tiny_config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


@pytest.mark.parametrize(
    ("rope", "steady", "most"),
    [
        (None, None, 2048),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None, 4096),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 2048, 4096),
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
            2048,
            4096,
        ),
        (LONGROPE, 512, 2048),
    ],
)
def test_ropes_that_depend_on_the_length_have_a_limit(rope: dict[str, Any] | None, steady: int, most: int) -> None:
    config = tiny_config("llama_gqa", **({"rope_parameters": rope} if rope else {}))

    assert steady_tokens(config) == steady
    assert max_tokens(config) == most


def test_the_strictest_of_several_ropes_counts() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = tiny_config("gemma3", rope_parameters={"sliding_attention": plain, "full_attention": LONGROPE})

    assert steady_tokens(config) == 512


def test_a_model_that_states_no_limit_has_none() -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())

    assert max_tokens(config) is None
    assert steady_tokens(config) is None


def _config(positions: int, **rope: Any) -> Any:
    config = SimpleNamespace(max_position_embeddings=positions, rope_parameters=rope)
    config.get_text_config = lambda decoder: config
    return config


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("model", "config", "most"),
    [
        ("Llama 3.1", _config(131072, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192), 131072),
        ("Llama 3.2", _config(131072, rope_type="llama3", factor=32.0, original_max_position_embeddings=8192), 131072),
        ("Code Llama", _config(16384, rope_type="default", rope_theta=1e6), 16384),
        ("Qwen2.5", _config(32768, rope_type="default"), 32768),
        ("Qwen2.5, yarn", _config(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (
            "Qwen2.5, yarn, stretched",
            _config(131072, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
            131072,
        ),
        ("Qwen3, yarn", _config(40960, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        ("Qwen2.5, yarn, no original", _config(32768, rope_type="yarn", factor=4.0), 131072),
        ("DeepSeek V3", _config(163840, rope_type="yarn", factor=40, original_max_position_embeddings=4096), 163840),
        ("gpt-oss", _config(131072, rope_type="yarn", factor=32.0, original_max_position_embeddings=4096), 131072),
        ("Phi-3 mini 128k", _config(131072, **LONG), 131072),
        ("Phi-4 mini", _config(131072, **LONG, partial_rotary_factor=0.75), 131072),
        (
            "Gemma 3 4B",
            _config(
                131072,
                sliding_attention={"rope_type": "default", "rope_theta": 1e4},
                full_attention={"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            ),
            131072,
        ),
        ("Vicuna 16k", _config(4096, rope_type="linear", factor=4.0), 16384),
        ("a dynamic Llama 2", _config(4096, rope_type="dynamic", factor=2.0), 8192),
        ("proportional", _config(131072, rope_type="proportional", factor=4.0), 131072),
        ("an older name of the field", _config(4096, type="linear", factor=4.0), 16384),
    ],
)
def test_the_longest_prompt_of_real_configs_is_theirs(model: str, config: Any, most: int) -> None:
    assert max_tokens(config) == most
