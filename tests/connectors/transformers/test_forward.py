"""Prompts are checked at the door; chunks always end at the same places."""

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import connectors.transformers.forward
from connectors.transformers.forward import Forward, chunk_bounds
from connectors.transformers.layout import new_cache
from kvstore.errors import RequestError
from tests.helpers.tiny_models import MAX_TOKENS, VOCAB, random_ids, tiny_model


@pytest.fixture(scope="module")
def forward() -> Forward:
    return Forward(tiny_model("llama_gqa"))


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(connectors.transformers.forward).failed == 0


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 64))
def test_a_run_that_resumes_at_a_boundary_makes_the_calls_of_a_full_run(start: int, stop: int, chunk: int) -> None:
    full = list(chunk_bounds(0, stop, chunk))
    resumed = list(chunk_bounds(start // chunk * chunk, stop, chunk))

    assert [pair for pair in full if pair[0] >= start // chunk * chunk] == resumed
    assert [last - first <= chunk for first, last in full] == [True] * len(full)
    assert sum(last - first for first, last in full) == stop


@pytest.mark.parametrize("kind", ["list", "tuple", "array", "tensor", "batch", "nested"])
def test_prompts_of_every_kind_become_the_same_tokens(forward: Forward, kind: str) -> None:
    import torch

    ids = random_ids(20)
    prompt: Any = {
        "list": ids,
        "tuple": tuple(ids),
        "array": np.array(ids, np.int64),
        "tensor": torch.tensor(ids),
        "batch": torch.tensor([ids]),
        "nested": [ids],
    }[kind]

    assert forward.prompt(prompt).tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        (np.array([], np.int64), "empty"),
        ([1, 2, VOCAB], rf"token 2 is {VOCAB}; the vocabulary has {VOCAB} ids"),
        ([1, -1], r"tokens\[1\] is -1"),
        ([1.0, 2.0], "float"),
        (np.array([1.5]), "float"),
        ([True, False], "bool"),
        (np.zeros((2, 3), np.int64), r"a batch of shape \(2, 3\)"),
        (
            [[1, 2], [3, 4]],
            "a batch of 2; here one prompt is computed at a time: call once for each .*, or serve .* by vLLM",
        ),
        (np.zeros((1, 2, 3), np.int64), "shape"),
        ({"input_ids": [1]}, "dict"),
        (b"abc", "bytes"),
        (None, "None"),
        (7, "int"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_reason(forward: Forward, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        forward.prompt(prompt)


def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(forward: Forward) -> None:
    longest = [1] * (MAX_TOKENS - 9)

    assert len(forward.prompt(longest, max_new_tokens=10)) == MAX_TOKENS - 9
    with pytest.raises(RequestError, match=f"{MAX_TOKENS - 9} tokens and 11 new ones.*{MAX_TOKENS} positions"):
        forward.prompt(longest, max_new_tokens=11)


def test_no_new_tokens_is_refused(forward: Forward) -> None:
    with pytest.raises(RequestError, match="max_new_tokens is 0"):
        forward.prompt([1], max_new_tokens=0)


def test_positions_are_passed_whatever_the_cache_says() -> None:
    model = tiny_model("llama_gqa")
    seen: list[Any] = []
    plain = model.forward

    def spy(*args: Any, position_ids: Any, **kwargs: Any) -> Any:
        seen.append(position_ids.tolist())
        return plain(*args, position_ids=position_ids, **kwargs)

    model.forward = spy
    Forward(model)(np.array([1, 2, 3], np.uint32), new_cache(model), 5)

    assert seen == [[[5, 6, 7]]]
