"""What a forward that fails leaves behind is never saved."""

from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S


class Failing:
    """Raises inside the n-th forward, when the first layer has its new tokens and the second has not.

    By a class of its own: a method put over a layer's would keep the model away from its store.
    """

    def __init__(self, model: Any) -> None:
        self.left = -1
        layer, failing = model.model.layers[1], self

        class FailingLayer(type(layer)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                failing.left -= 1
                if failing.left == 0:
                    raise RuntimeError("out of memory")
                return super().forward(*args, **kwargs)

        layer.__class__ = FailingLayer


@pytest.mark.parametrize("name", ["llama_gqa", "mistral"])
@pytest.mark.parametrize(("fails_at", "saved_blocks"), [(1, 0), (2, 0), (4, 0), (5, 6), (8, 6), (17, 6)])
def test_blocks_of_a_broken_cache_are_not_saved(name: str, fails_at: int, saved_blocks: int) -> None:
    """Four forwards for the prompt, then one for each token. What was whole before is saved when the prompt is done."""
    model = tiny_model(name)
    failing = Failing(model)
    layout = model_layout(model, 16)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=32, reuse="any"))
    ids = random_ids(100)
    with KVCacheModel(model, store, prefill_chunk=32, reuse="any") as opened:
        expected = opened.generate(ids[:3], 1).tokens
        failing.left = fails_at

        with pytest.raises(RuntimeError, match="out of memory"):
            opened.generate(ids, 30)

        assert opened.flush(WAIT_S)
        assert len(store.pages) == saved_blocks
        assert not store.open_leases
        assert store.finishes[-1] == ("cancelled", False)
        again = opened.generate(ids, 30)
        assert opened.generate(ids[:3], 1).tokens == expected
    assert again.tokens == KVCacheModel(model, prefill_chunk=32).generate(ids, 30).tokens


def test_a_recorder_that_fails_ends_saving_and_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from connectors.transformers.cache import Recorder

    model = tiny_model("mistral")
    layout = model_layout(model, 16)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=32))
    expected = KVCacheModel(model, prefill_chunk=32).generate(random_ids(100), 5).tokens

    def broken(*_: Any) -> None:
        raise LookupError("no such tokens")

    monkeypatch.setattr(Recorder, "after", broken)
    with KVCacheModel(model, store, prefill_chunk=32) as opened:
        assert opened.generate(random_ids(100), 5).tokens == expected
        assert opened.flush(WAIT_S)
        assert opened.connector is not None
        assert opened.connector.counters.save_failures == 1

    assert store.pages == {}
