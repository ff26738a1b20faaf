"""Layouts come from what a model really caches; what cannot be cut into pages is refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.transformers.layout import CacheShapes, LayerShape, cache_shapes, layout_of, model_device, model_layout
from kvstore.errors import ConfigError, UnsupportedModel
from kvstore.layout import GroupKind
from tests.helpers.tiny_models import REFUSED, SUPPORTED, tiny_model


@pytest.mark.parametrize(
    ("name", "groups", "shapes"),
    [
        ("llama_gqa", [(GroupKind.FULL, (0, 1), 2 * 2 * 2 * 16 * 4 * 16, None)], "k2x16,v2x16"),
        ("llama_mha", [(GroupKind.FULL, (0, 1), 2 * 2 * 4 * 16 * 4 * 16, None)], "k4x16,v4x16"),
        ("llama_mqa", [(GroupKind.FULL, (0, 1), 2 * 2 * 1 * 16 * 4 * 16, None)], "k1x16,v1x16"),
        ("deepseek_v3", [(GroupKind.MLA, (0, 1), 2 * (32 + 8) * 4 * 16, None)], "k1x32,v1x8"),
        ("mistral", [(GroupKind.SLIDING, (0, 1), 2 * 2 * 2 * 16 * 4 * 16, 40)], "k2x16,v2x16"),
        (
            "gemma2",
            [(GroupKind.SLIDING, (0,), 4096, 40), (GroupKind.FULL, (1,), 4096, None)],
            "k2x16,v2x16",
        ),
    ],
)
def test_layout_of_each_kind_of_attention(name: str, groups: list[Any], shapes: str) -> None:
    layout = model_layout(tiny_model(name), 16)

    assert [(g.kind, g.layers, g.page_bytes, g.window) for g in layout.groups] == groups
    assert layout.format == f"transformers:layer,kv,head,token,dim;{shapes}"
    assert (layout.dtype, layout.block_size, layout.shards) == ("float32", 16, 1)


def test_bfloat16_halves_the_pages_and_changes_the_fingerprint() -> None:
    single, half = (model_layout(tiny_model("llama_gqa", dtype), 16) for dtype in ("float32", "bfloat16"))

    assert half.dtype == "bfloat16"
    assert 2 * half.block_bytes == single.block_bytes
    assert half.fingerprint != single.fingerprint


def test_equal_sizes_of_other_shape_are_another_layout() -> None:
    import torch

    def layout(heads: int, dim: int) -> str:
        shape = LayerShape(None, (heads, heads), (dim, dim), (torch.float32, torch.float32))
        return layout_of(CacheShapes((shape,)), 16).fingerprint

    assert layout(2, 16) != layout(1, 32)


def test_layers_that_share_the_cache_of_another_keep_no_pages() -> None:
    model = tiny_model("llama_gqa")
    first, _ = cache_shapes(model).layers

    layout = layout_of(CacheShapes((first, None)), 16)

    assert [group.layers for group in layout.groups] == [(0,)]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_whose_state_is_not_in_their_cache_are_refused_by_name(name: str) -> None:
    model = tiny_model(name)

    with pytest.raises(
        UnsupportedModel, match=rf"'{name}' replaces the DynamicCache.*with its state in the cache work"
    ):
        model_layout(model, 16)


def test_a_layer_of_an_unknown_class_is_refused_with_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils

    class Novelty(cache_utils.LinearAttentionLayer):
        """Keeps something more."""

    model = tiny_model("lfm2")
    cache = cache_utils.DynamicCache(config=model.config)
    cache.layers[0] = Novelty()
    monkeypatch.setattr("connectors.transformers.layout.new_cache", lambda model: cache)

    with pytest.raises(UnsupportedModel, match=r"'lfm2': layer 0 caches in a Novelty, of which it is not known"):
        model_layout(model, 16)


@pytest.mark.parametrize(
    ("name", "block_groups", "kinds"),
    [
        ("falcon_h1", 2, {"conv_states": "bfloat16", "recurrent_states": "float32"}),
        ("qwen3_next", 1, {"conv_states": "bfloat16", "recurrent_states": "float32"}),
        ("lfm2", 1, {"conv_states": "bfloat16"}),
        ("mamba2", 0, {"conv_states": "bfloat16", "recurrent_states": "float32"}),
    ],
)
def test_each_tensor_of_a_state_has_its_own_type_and_its_bytes_are_in_the_pieces(
    name: str, block_groups: int, kinds: dict[str, str]
) -> None:
    model = tiny_model(name, "bfloat16")
    shapes, layout = cache_shapes(model), model_layout(model, 16)

    assert {tensor.name: str(tensor.dtype).removeprefix("torch.") for tensor in shapes.states} == kinds
    assert all(tensor.start % 16 == 0 for tensor in shapes.states)
    assert layout.block_groups == block_groups
    assert layout.state_bytes == shapes.state_bytes == sum(group.page_bytes for group in layout.groups[block_groups:])


def test_a_state_of_another_shape_or_type_is_another_layout() -> None:
    prints = {
        model_layout(tiny_model("lfm2", dtype, **fields), 16).fingerprint
        for dtype, fields in [("float32", {}), ("bfloat16", {}), ("float32", {"conv_L_cache": 4})]
    }

    assert len(prints) == 3


def test_a_model_that_swaps_in_a_cache_of_its_own_is_refused() -> None:
    from transformers import StaticCache

    model = tiny_model("llama_gqa")
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.past_key_values = StaticCache(config=model.config, max_cache_len=8)
        return output

    model.forward = forward

    with pytest.raises(UnsupportedModel, match="replaces the DynamicCache"):
        model_layout(model, 16)


def test_a_model_that_quantizes_its_cache_layers_is_refused() -> None:
    from transformers.cache_utils import DynamicLayer

    class RoundedLayer(DynamicLayer):  # type: ignore[misc]
        """Any subclass may keep more than keys and values."""

    model = tiny_model("llama_gqa")
    plain = model.forward

    def forward(*args: Any, past_key_values: Any, **kwargs: Any) -> Any:
        past_key_values.layers[1] = RoundedLayer()
        return plain(*args, past_key_values=past_key_values, **kwargs)

    model.forward = forward

    with pytest.raises(UnsupportedModel, match="layer 1 caches in a RoundedLayer"):
        model_layout(model, 16)


def test_an_encoder_decoder_is_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True, model_type="t5"))

    with pytest.raises(UnsupportedModel, match="'t5' is an encoder-decoder"):
        model_layout(model, 16)


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="window of 1"):
        model_layout(tiny_model("mistral", sliding_window=1), 16)


def test_a_block_size_of_zero_is_refused_with_the_field_and_the_value() -> None:
    with pytest.raises(ConfigError, match="block_size is 0"):
        model_layout(tiny_model("llama_gqa"), 0)


@pytest.mark.parametrize(("places", "words"), [(("cpu", "meta"), "several devices"), (("meta", "meta"), "'meta'")])
def test_a_model_that_is_not_on_one_usable_device_is_refused(places: tuple[str, str], words: str) -> None:
    import torch

    parameters = [torch.empty(1, device=place) for place in places]
    model = SimpleNamespace(parameters=lambda: parameters)

    with pytest.raises(ConfigError, match=words):
        model_device(model)


def test_every_supported_tiny_model_has_a_layout() -> None:
    for name in SUPPORTED:
        assert model_layout(tiny_model(name), 16).groups
