"""Over the border of a rope that depends on the length: the tokens that transformers itself generates."""

import threading
from functools import cache
from typing import Any

import pytest
import torch

from connectors.transformers import KVCacheModel
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from connectors.transformers.ropes import ropes_of
from kvstore.errors import RequestError
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids, tiny_model

BORDER = 128
BLOCK = 16
CHUNK = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": BORDER,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": BORDER}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3 longrope": (
        "phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 512, "original_max_position_embeddings": BORDER},
    ),
    "Llama longrope": ("llama_gqa", {"rope_parameters": LONG, "max_position_embeddings": 512}),
    "dynamic": (
        "llama_gqa",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": BORDER,
        },
    ),
    "yarn": ("llama_gqa", {"rope_parameters": {"rope_type": "yarn", **SCALED}, "max_position_embeddings": 512}),
    "linear": ("llama_gqa", {"rope_parameters": {"rope_type": "linear", **SCALED}, "max_position_embeddings": BORDER}),
    "llama3": (
        "llama_gqa",
        {
            "rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
            "max_position_embeddings": 512,
        },
    ),
    "linear where all is seen": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
}
CASES = [(100, 20), (100, 60), (127, 4), (128, 1), (128, 20), (129, 20), (200, 20)]


def fresh(name: str) -> Any:
    kind, fields = ROPES[name]
    return tiny_model(kind, **fields)


@cache
def by_transformers(name: str, length: int, new: int) -> list[int]:
    """The tokens of a model that has seen nothing else."""
    model, ids = fresh(name), random_ids(length, seed=length)
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def opened(model: Any) -> KVCacheModel:
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK))
    return KVCacheModel(model, store, prefill_chunk=CHUNK)


@pytest.mark.parametrize("name", sorted(ROPES))
def test_tokens_over_the_border_are_those_of_transformers_whatever_was_asked_before(name: str) -> None:
    with opened(fresh(name)) as kv:
        for _ in range(2):  # again, with pages in the store and a rope that has grown
            for length, new in CASES:
                ids = random_ids(length, seed=length)
                assert kv.generate(ids, new).tokens == by_transformers(name, length, new), (length, new)
                assert kv.flush(10.0)


@pytest.mark.parametrize("name", ["Phi-3 longrope", "Llama longrope", "dynamic"])
def test_runs_that_take_turns_on_one_model_do_not_turn_each_others_ropes(name: str) -> None:
    asked = [(100, 60), (40, 30), (200, 20), (126, 10)]
    with opened(fresh(name)) as kv:
        runs = [kv.start(random_ids(length, seed=length), new) for length, new in asked]
        while not all(run.is_done for run in runs):
            for run in runs:
                run.step()

        for run, (length, new) in zip(runs, asked, strict=True):
            assert run.result.tokens == by_transformers(name, length, new)


@pytest.mark.parametrize("name", ["Phi-3 longrope", "dynamic"])
def test_threads_on_one_model_do_not_turn_each_others_ropes(name: str) -> None:
    answers: dict[int, list[list[int]]] = {}
    with opened(fresh(name)) as kv:

        def ask(length: int) -> None:
            answers[length] = [kv.generate(random_ids(length, seed=length), 8).tokens for _ in range(10)]

        threads = [threading.Thread(target=ask, args=(length,)) for length in (100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for length, tokens in answers.items():
        assert tokens == [by_transformers(name, length, 8)] * 10


def test_models_that_start_again_at_the_border_are_told_from_those_that_go_on() -> None:
    restarts = {name: ropes.restarts for name in ROPES if (ropes := ropes_of(fresh(name))) is not None}

    assert restarts == {"Phi-3 longrope": True, "Llama longrope": False, "dynamic": False}


def test_a_model_that_does_not_say_what_it_does_at_the_border_is_not_taken_over_it() -> None:
    model = fresh("Llama longrope")

    def puzzled(*_: Any, **__: Any) -> None:
        raise TypeError("not like this")

    model.prepare_inputs_for_generation = puzzled
    kv = KVCacheModel(model, prefill_chunk=CHUNK)

    with pytest.raises(RequestError, match=r"100 tokens and 60 new ones cross 128.*at most 29 work"):
        kv.generate(random_ids(100), 60)
    assert len(kv.generate(random_ids(100), 29).tokens) == 29
    assert len(kv.generate(random_ids(200), 4).tokens) == 4
