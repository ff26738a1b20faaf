"""Length limits, as configs state them."""

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.transformers_positions import max_tokens, steady_tokens
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
        (LONGROPE, 512, 8192),
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
