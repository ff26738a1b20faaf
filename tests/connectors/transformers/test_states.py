"""Where a model's state is taken: the end of a prompt, where prompts part, and here and there, within a budget."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from connectors.transformers.states import MAX_STATES, StatePlan, plan_for, scan_chunk
from kvstore.layout import GroupKind, LayerSpec, Layout, groups_with_states
from tests.helpers.tiny_models import tiny_model

PLAN = StatePlan(unit=64, spacing=512)


@pytest.mark.parametrize(
    ("start", "num_tokens", "branch", "places"),
    [
        (0, 63, 0, []),
        (0, 64, 0, [64]),
        (0, 500, 0, [448]),
        (448, 500, 0, []),  # it is there already
        (0, 500, 300, [256, 448]),  # where it parts from a stored prompt
        (0, 500, 900, [448]),  # all of it was stored
        (0, 448, 0, [384, 448]),  # the same prompt again: its last token is always computed
        (384, 448, 0, [448]),
        (256, 500, 300, [448]),
        (0, 1500, 0, [512, 1024, 1472]),
        (0, 1500, 200, [192, 512, 1024, 1472]),
        (1024, 1500, 200, [1472]),
    ],
)
def test_states_are_taken_at_the_end_where_prompts_part_and_regularly(
    start: int, num_tokens: int, branch: int, places: list[int]
) -> None:
    assert PLAN.places(start, num_tokens, branch) == places


@pytest.mark.parametrize("branch", [0, 700])
def test_a_prompt_has_a_budget_and_the_deepest_places_come_first(branch: int) -> None:
    places = PLAN.places(0, 20_000, branch)

    assert len(places) == MAX_STATES
    assert PLAN.last(20_000) in places
    assert not branch or PLAN.last(branch) in places
    assert 19_456 in places  # the last regular one: another prompt that goes nearly as far resumes there
    assert all(place % 64 == 0 for place in places)


@pytest.mark.parametrize(
    ("token_bytes", "state_bytes", "spacing"),
    [
        (1024, 141 << 10, 512),
        (32 << 10, 51 << 20, 8192),  # that of a hybrid of 4 billion parameters
        (12 << 10, 123 << 10, 512),
    ],
)
def test_regular_states_take_at_most_a_share_of_what_is_stored(
    token_bytes: int, state_bytes: int, spacing: int
) -> None:
    groups = groups_with_states([LayerSpec(GroupKind.FULL, token_bytes)], 64, [1], state_bytes)
    model = SimpleNamespace(config=SimpleNamespace())

    plan = plan_for(model, Layout(64, groups, "test", "bfloat16"), 256, is_exact=True)

    assert plan == StatePlan(256, spacing)
    assert state_bytes <= 0.3 * spacing * token_bytes


def test_places_are_whole_blocks_and_whole_chunks_of_the_scan_or_prefill_chunks() -> None:
    model = tiny_model("falcon_h1")  # its scan computes 32 tokens at once
    layout = model_layout(model, 16)

    exact = plan_for(model, layout, 48, is_exact=True)
    free = plan_for(model, layout, 48, is_exact=False)

    assert exact is not None
    assert free is not None
    assert (exact.unit, free.unit) == (48, 32)
    assert plan_for(tiny_model("llama_gqa"), model_layout(tiny_model("llama_gqa"), 16), 48, is_exact=True) is None


@pytest.mark.parametrize(
    ("name", "size"), [("falcon_h1", 32), ("mamba2", 32), ("nemotron_h", 32), ("qwen3_next", 64), ("lfm2", 1)]
)
def test_the_chunk_of_a_scan_comes_from_the_config(name: str, size: int) -> None:
    assert scan_chunk(tiny_model(name).config) == size


def test_states_of_another_version_or_other_kernels_are_in_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    stateful, plain = tiny_model("lfm2"), tiny_model("llama_gqa")
    layouts = [model_layout(model, 16) for model in (stateful, plain)]

    def names() -> list[object]:
        models = zip((stateful, plain), layouts, strict=True)
        return [model_namespace(model, layout, revision="r", reuse="any") for model, layout in models]

    before = names()
    monkeypatch.setattr("connectors.transformers.identity._version", lambda package: "5.99.1")
    version = names()
    monkeypatch.setattr("connectors.transformers.identity._kernels", lambda: "mamba-ssm 2.3.1")
    kernels = names()

    assert before[0] != version[0] != kernels[0]
    assert before[1] == version[1] == kernels[1], "pages outlive a fix of the library, states do not"
