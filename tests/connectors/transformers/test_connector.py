"""The connector over a dict: what it asks of a store, and that nothing a store does can reach the model."""

import threading
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from connectors.transformers.connector import TransformersConnector
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from kvstore.errors import ConfigError, LayoutMismatch, RequestError
from kvstore.plan.records import RequestOptions
from tests.helpers.dict_models import BLOCK, CHUNK, NEW_TOKENS, ask, reused
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids, tiny_model


def test_saving_decoded_blocks_is_refused_in_exact_mode(opened: Any) -> None:
    with pytest.raises(ConfigError, match="save is 'all' with reuse 'exact'"):
        opened(save="all")


def test_a_save_that_does_not_exist_is_refused(opened: Any) -> None:
    with pytest.raises(ConfigError, match="save is 'some'; it must be one of auto, all, prompt"):
        opened(save="some", reuse="any")


@pytest.mark.parametrize(
    "method",
    ["request", "wait_lookup", "prepare_load", "wait", "prepare_save", "complete", "finished", "observe_prefill"],
)
@pytest.mark.parametrize("reuse", ["exact", "any"])
def test_a_store_that_raises_is_a_store_that_is_not_there(opened: Any, method: str, reuse: str) -> None:
    model, store = opened(reuse=reuse)
    cold = KVCacheModel(model.model, prefill_chunk=CHUNK)
    ids = random_ids(100)
    ask(model, ids)
    expected = cold.generate(ids, NEW_TOKENS).tokens

    store.raises = {method}
    answer = ask(model, ids)
    store.raises = set()

    assert answer.tokens == expected
    assert ask(model, ids).tokens == expected


@pytest.mark.parametrize("change", ["train", "weights", "attention"])
def test_a_model_that_has_changed_does_not_touch_the_store(opened: Any, change: str) -> None:
    import torch

    model, store = opened()
    model.model = own = tiny_model("llama_gqa")
    layout = store.layout
    any_store: Any = DictStore(layout, model_namespace(own, layout, prefill_chunk=CHUNK))
    with KVCacheModel(own, any_store, prefill_chunk=CHUNK) as changing:
        ask(changing, random_ids(100))
        calls = dict(any_store.calls)
        if change == "train":
            own.train()
        elif change == "weights":
            with torch.no_grad():
                own.lm_head.weight.mul_(1.5)
        else:
            own.set_attn_implementation("eager")

        answer = ask(changing, random_ids(100))

        assert reused(answer) == 0
        assert dict(any_store.calls) == calls
        assert changing.connector is not None
        assert changing.connector.counters.bypassed == 1
        assert list(changing.connector.counters.reasons) == [
            {"train": "model changed: training", "weights": "model changed: weights"}.get(
                change, "model changed: attention"
            )
        ]


def test_full_chunks_teach_the_store_the_prefill_rate(opened: Any) -> None:
    model, store = opened()

    ask(model, random_ids(100))
    ask(model, random_ids(20, seed=1))

    assert store.prefills == [CHUNK] * 3


def test_options_reach_the_store_and_wrong_ones_are_the_callers_error(opened: Any) -> None:
    model, store = opened()
    ids = random_ids(100)
    ask(model, ids, options=RequestOptions(tenant="a"))

    assert reused(ask(model, ids, options=RequestOptions(tenant="b"))) == 0
    assert reused(ask(model, ids, options=RequestOptions(tenant="a"))) == 96

    def refuse(*_: Any) -> Any:
        raise RequestError("options.ttl_s is -1")

    store.request = refuse
    with pytest.raises(RequestError, match="ttl_s"):
        model.generate(ids, NEW_TOKENS)


def test_a_store_of_another_layout_is_refused(models: dict[str, Any]) -> None:
    layout = model_layout(models["gemma3"], BLOCK)
    store: Any = DictStore(layout, model_namespace(models["gemma3"], layout))

    with pytest.raises(LayoutMismatch, match="this model makes pages of"):
        TransformersConnector(models["llama_gqa"], store)


@pytest.mark.parametrize(
    ("namespace", "words"),
    [
        ({"prefill_chunk": 64}, "prefill is 'exact:64', here 'exact:32'"),
        ({"reuse": "any"}, "prefill is 'any'"),
    ],
)
def test_a_store_opened_in_another_mode_is_refused(
    models: dict[str, Any], namespace: dict[str, Any], words: str
) -> None:
    model = models["llama_gqa"]
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, **namespace))

    with pytest.raises(ConfigError, match=words):
        TransformersConnector(model, store, prefill_chunk=CHUNK)


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny_model("llama_gqa").train()
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout))

    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        TransformersConnector(model, store)


@pytest.mark.parametrize(("chunk", "right"), [(0, 16), (-16, 16), (20, 16), (30, 32)])
def test_a_chunk_that_is_no_multiple_of_the_block_is_refused(models: dict[str, Any], chunk: int, right: int) -> None:
    model = models["llama_gqa"]
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout))

    with pytest.raises(ConfigError, match=f"prefill_chunk is {chunk}; .* block size 16, e.g. {right}"):
        TransformersConnector(model, store, prefill_chunk=chunk)


def test_closing_twice_is_closing_once_and_leaves_no_thread(opened: Any) -> None:
    model, _ = opened()
    ask(model, random_ids(40))

    model.close()
    model.close()

    assert not [thread for thread in threading.enumerate() if "transformers-save" in thread.name]
    assert model.generate(random_ids(40), NEW_TOKENS).tokens  # still answers, without saving
