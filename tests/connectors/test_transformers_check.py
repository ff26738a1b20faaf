"""The self-check passes what works and finds the two faults seen in real model code."""

from typing import Any

import pytest

from connectors.transformers_check import PROVEN, EngineCheck, check_engine
from kvstore.errors import UnsupportedModel
from tests.helpers.tiny_models import REFUSED, SUPPORTED, tiny_config, tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_every_supported_model_passes(name: str, dtype: str) -> None:
    check = check_engine(tiny_model(name, dtype))

    check.require()
    assert check.pages_exact
    assert check.difference <= check.tolerance


def test_the_list_of_proven_model_types_is_that_of_the_models_tested_here() -> None:
    assert {tiny_config(name).model_type for name in SUPPORTED} == PROVEN


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_without_pages_do_not_get_as_far_as_the_check(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="has no pages"):
        check_engine(tiny_model(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_start_again_behind_a_filled_cache_are_found(dtype: str) -> None:
    import torch

    model = tiny_model("llama_gqa", dtype)
    plain = model.forward

    def forward(*args: Any, position_ids: Any, **kwargs: Any) -> Any:
        return plain(*args, position_ids=torch.arange(position_ids.shape[1])[None], **kwargs)

    model.forward = forward
    check = check_engine(model)

    assert not check.ok
    assert check.difference > 3 * check.tolerance
    with pytest.raises(UnsupportedModel, match="'llama' does not resume"):
        check.require()


def test_a_past_that_is_ignored_when_several_tokens_follow_is_found() -> None:
    model = tiny_model("llama_gqa")
    plain = model.forward

    def forward(*args: Any, input_ids: Any, past_key_values: Any, **kwargs: Any) -> Any:
        if past_key_values.get_seq_length() and input_ids.shape[1] > 1:
            for layer in past_key_values.layers:
                layer.values = torch.zeros_like(layer.values)
        return plain(*args, input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    import torch

    model.forward = forward

    assert not check_engine(model).ok


def test_pages_that_differ_from_the_live_cache_fail_however_little() -> None:
    check = EngineCheck("x", pages_exact=False, difference=0.0, tolerance=1.0, seconds=0.0)

    with pytest.raises(UnsupportedModel, match="are NOT bit-equal"):
        check.require()
