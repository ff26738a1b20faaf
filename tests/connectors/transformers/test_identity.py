"""Anything that a page's bytes depend on changes the namespace; nothing else does."""

from types import SimpleNamespace
from typing import Any

import pytest

from connectors.transformers.identity import Reuse, active_adapters, check_reuse, model_namespace, weights_fingerprint
from connectors.transformers.layout import model_layout
from kvstore.errors import ConfigError
from tests.helpers.tiny_models import random_ids, tiny_config, tiny_model


def namespace(model: Any, block_size: int = 16, **options: Any) -> Any:
    return model_namespace(model, model_layout(model, block_size), **options)


def add_tuner(model: Any, name: str, scale: float = 1.0) -> Any:
    """Wrap one projection as PEFT does: same attributes, none of its code."""
    import torch

    class Tuner(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_A = torch.nn.Linear(64, 4, bias=False)
            self.active_adapters = [name]
            self.disable_adapters = False
            self.merged_adapters: list[str] = []
            self.scaling = {name: scale}

        def forward(self, x: Any) -> Any:
            return self.base_layer(x)

    attention = model.model.layers[0].self_attn
    attention.q_proj = Tuner(attention.q_proj)
    return attention.q_proj


def test_two_builds_of_one_model_share_a_namespace() -> None:
    assert namespace(tiny_model("llama_gqa")).root() == namespace(tiny_model("llama_gqa")).root()


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("revision", lambda: namespace(tiny_model("llama_gqa", seed=1))),
        ("dtype", lambda: namespace(tiny_model("llama_gqa", "bfloat16"))),
        ("layout", lambda: namespace(tiny_model("llama_mha"))),
        ("block_size", lambda: namespace(tiny_model("llama_gqa"), 32)),
        ("model", lambda: namespace(tiny_model("qwen2"))),
        ("salt", lambda: namespace(tiny_model("llama_gqa"), salt="tenant")),
        ("extra", lambda: namespace(tiny_model("llama_gqa", rope_theta=5000.0))),
        ("extra", lambda: namespace(tiny_model("llama_gqa", rms_norm_eps=1e-3))),
        ("extra", lambda: namespace(tiny_model("llama_gqa"), prefill_chunk=128)),
        ("extra", lambda: namespace(tiny_model("llama_gqa"), reuse="any")),
    ],
)
def test_every_difference_gives_another_namespace_and_is_named(field: str, other: Any) -> None:
    ours, theirs = namespace(tiny_model("llama_gqa")), other()

    assert ours.root() != theirs.root()
    assert getattr(ours, field) != getattr(theirs, field)


def test_attention_implementation_is_part_of_the_namespace() -> None:
    model = tiny_model("llama_gqa")
    before = namespace(model).root()

    model.set_attn_implementation("eager")

    assert namespace(model).root() != before


def test_a_revision_that_the_caller_names_is_taken_as_it_is() -> None:
    assert namespace(tiny_model("llama_gqa"), revision="abc").revision == "abc"


def test_where_a_model_was_found_does_not_matter() -> None:
    model = tiny_model("llama_gqa")
    before = namespace(model).root()

    model.config._name_or_path = "/somewhere/else"
    model.config.transformers_version = "5.0.0"

    assert namespace(model).root() == before


def test_threads_matter_to_exact_reuse_only() -> None:
    import torch

    model = tiny_model("llama_gqa")
    threads = torch.get_num_threads()
    exact, near = namespace(model), namespace(model, reuse="any")
    try:
        torch.set_num_threads(threads + 1)

        assert namespace(model).root() != exact.root()
        assert namespace(model, reuse="any").root() == near.root()
    finally:
        torch.set_num_threads(threads)


def test_any_reuse_does_not_depend_on_the_chunk() -> None:
    model = tiny_model("llama_gqa")

    assert namespace(model, reuse="any", prefill_chunk=64) == namespace(model, reuse=Reuse.ANY, prefill_chunk=128)


def test_one_changed_weight_or_buffer_changes_the_fingerprint() -> None:
    import torch

    model = tiny_model("llama_gqa")
    seen = {weights_fingerprint(model)}

    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    seen.add(weights_fingerprint(model))
    model.model.rotary_emb.inv_freq[0] *= 2
    seen.add(weights_fingerprint(model))
    model.register_buffer("more", torch.zeros(0))
    seen.add(weights_fingerprint(model))

    assert len(seen) == 4


def test_a_rope_that_moves_while_the_model_runs_does_not_move_the_fingerprint() -> None:
    import torch

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama_gqa", rope_parameters=rope, max_position_embeddings=64)
    before = weights_fingerprint(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()

    with torch.inference_mode():
        model(torch.tensor([random_ids(200)]))

    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)  # it did move
    assert weights_fingerprint(model) == before


def test_weights_whose_bytes_cannot_be_read_are_refused_with_the_way_out() -> None:
    import torch

    class Sealed(torch.Tensor):
        def cpu(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("packed")

    model = SimpleNamespace(
        config=tiny_config("llama_gqa"),
        named_parameters=lambda: [("w", torch.zeros(2).as_subclass(Sealed))],
        named_buffers=lambda: [],
    )

    with pytest.raises(ConfigError, match=r"'w' cannot be read.*revision="):
        weights_fingerprint(model)


def test_a_model_without_adapters_has_none() -> None:
    assert active_adapters(tiny_model("llama_gqa")) == ""


def test_an_adapter_its_strength_and_whether_it_is_on_are_part_of_the_identity() -> None:
    model = tiny_model("llama_gqa")
    tuner = add_tuner(model, "poet")
    on = active_adapters(model)
    tuner.scaling = {"poet": 0.5}
    weaker = active_adapters(model)
    tuner.disable_adapters = True
    off = active_adapters(model)

    assert on.startswith("poet#")
    assert weaker.startswith("poet#")
    assert on != weaker
    assert off == ""


def test_a_merged_adapter_is_in_force_though_none_is_active() -> None:
    model = tiny_model("llama_gqa")
    tuner = add_tuner(model, "poet")
    tuner.active_adapters = []
    tuner.merged_adapters = ["poet"]

    assert active_adapters(model).startswith("poet#")


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fast'; it must be one of exact, any"):
        check_reuse("fast")
