"""The self-check passes what works and finds the two faults seen in real model code."""

from typing import Any

import pytest

from connectors.transformers.cache import CacheBridge
from connectors.transformers.check import PROVEN, EngineCheck, check_engine, is_proven
from kvstore.errors import UnsupportedModel
from tests.helpers.tiny_models import IGNORANT, REFUSED, STATEFUL, SUPPORTED, tiny_config, tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_every_supported_model_passes(name: str, dtype: str) -> None:
    check = check_engine(tiny_model(name, dtype))

    check.require()
    assert check.pages_exact
    assert check.difference <= check.tolerance


def test_the_list_of_proven_model_types_is_that_of_the_models_tested_here() -> None:
    assert {tiny_config(name).model_type for name in SUPPORTED} == PROVEN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_models_with_a_state_resume_at_every_border_with_one_token_and_several_and_where_prompts_part(
    name: str, dtype: str
) -> None:
    model = tiny_model(name, dtype)

    check = check_engine(model)

    check.require()
    assert check.difference <= check.tolerance / 10
    assert not is_proven(model), "a model with a state is checked each time it is opened"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(IGNORANT))
def test_a_model_that_ignores_its_state_when_several_tokens_follow_is_refused_with_the_version(
    name: str, dtype: str
) -> None:
    import transformers

    check = check_engine(tiny_model(name, dtype))

    assert check.pages_exact, "the pages are right, the model is not"
    with pytest.raises(UnsupportedModel, match=rf"'{name}' ignores the state.*transformers {transformers.__version__}"):
        check.require()


def test_a_state_that_is_put_back_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    put = CacheBridge._put_state

    def put_wrongly(self: CacheBridge, cache: Any, data: Any) -> None:
        data[-1] ^= 1  # one bit of the last recurrent state
        put(self, cache, data)

    monkeypatch.setattr(CacheBridge, "_put_state", put_wrongly)

    assert not check_engine(tiny_model("falcon_h1")).pages_exact


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_without_a_state_in_their_cache_do_not_get_as_far_as_the_check(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="replaces the DynamicCache"):
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


def _blind_behind(model: Any, num_tokens: int) -> Any:
    """Make `model` ignore its past once it has seen `num_tokens`: a fault that shows behind a long window only."""
    import torch

    plain = model.forward

    def forward(*args: Any, input_ids: Any, past_key_values: Any, **kwargs: Any) -> Any:
        if past_key_values.get_seq_length() > num_tokens:
            for layer in past_key_values.layers:
                layer.values = torch.zeros_like(layer.values)
        return plain(*args, input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    model.forward = forward
    return model


@pytest.mark.parametrize(("window", "found"), [(40, False), (200, True), (500, True)])
def test_the_check_goes_on_behind_windows_longer_than_itself(window: int, found: bool) -> None:
    plain = tiny_model("mistral", sliding_window=window)
    faulty = _blind_behind(tiny_model("mistral", sliding_window=window), 190)

    assert check_engine(plain).ok
    assert check_engine(faulty).ok is not found


def test_a_window_that_no_prompt_reaches_is_checked_as_far_as_there_are_positions() -> None:
    assert check_engine(tiny_model("mistral", sliding_window=100_000, max_position_embeddings=128)).ok


def test_a_window_too_long_to_check_is_refused_with_the_way_out() -> None:
    model = tiny_model("mistral", sliding_window=40_000, max_position_embeddings=100_000)

    with pytest.raises(UnsupportedModel, match=r"window of 40000 tokens.*reaches 16384\. self_check=False"):
        check_engine(model)


def test_a_short_border_of_a_rope_does_not_fail_the_check() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}

    assert check_engine(tiny_model("llama_gqa", rope_parameters=rope, max_position_embeddings=64)).ok


def test_a_proven_type_whose_config_makes_it_look_both_ways_is_checked_and_refused() -> None:
    plain = tiny_model("gemma3")
    both = tiny_model("gemma3", use_bidirectional_attention=True)
    turned = tiny_model("llama_gqa")
    turned.model.layers[1].self_attn.is_causal = False

    assert is_proven(plain)
    assert not is_proven(both)
    assert not is_proven(turned)
    assert not check_engine(both).ok
