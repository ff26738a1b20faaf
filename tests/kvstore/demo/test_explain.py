from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.demo.explain import DecodeCost, ReuseExplanation, measure
from tests.helpers.tiny_models import random_ids, tiny_model

SMOLLM2 = ReuseExplanation(
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_dim=64,
    value_bytes=2,
    prefill_tokens_per_s=500.0,
    decode_tokens_per_s=10.0,
    steps=(DecodeCost(256, 0.06, 0.6), DecodeCost(2000, 0.1, 4.0)),
)


def test_bytes_per_token_follow_the_heads_that_keep_keys_and_values() -> None:
    assert SMOLLM2.token_bytes == 23_040
    assert SMOLLM2.mha_token_bytes == 69_120


def test_the_text_has_the_arithmetic_and_both_costs_of_a_step() -> None:
    text = "\n".join(SMOLLM2.lines())

    assert "2 x 30 layers" not in text  # the factor stands for K and V and says so
    assert "K and V (2) x 30 layers x 3 heads x 64 numbers x 2 bytes = 23,040 bytes per token" in text
    assert "behind 2,000: 100 ms with the cache, 4,000 ms without (40 times as much)" in text
    assert "3 times as much to keep" in text


def test_a_model_with_full_heads_is_not_compared_with_itself() -> None:
    text = "\n".join(replace(SMOLLM2, kv_heads=9).lines())

    assert "all 9 heads keep keys and values" in text
    assert "With multi-head attention it would be" not in text


def test_an_explanation_survives_its_record() -> None:
    assert ReuseExplanation.from_record(SMOLLM2.to_record()) == SMOLLM2


@pytest.mark.parametrize(("name", "kv_heads"), [("llama_gqa", 2), ("llama_mha", 4), ("llama_mqa", 1)])
def test_the_geometry_is_read_from_the_model_and_its_cache(name: str, kv_heads: int) -> None:
    told = ReuseExplanation.from_record(measure(tiny_model(name), random_ids(300), 64))

    assert (told.layers, told.query_heads, told.kv_heads, told.head_dim, told.value_bytes) == (2, 4, kv_heads, 16, 4)
    assert [step.num_tokens for step in told.steps] == [256, 300]
    assert all(step.cached_s > 0 and step.uncached_s > 0 for step in told.steps)
