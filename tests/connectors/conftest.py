from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from connectors.transformers import KVCacheModel
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from tests.helpers.dict_models import BLOCK, CHUNK
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Models this small are slower with two, and many times slower beside other programs."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name) for name in ("llama_gqa", "gemma3", "mistral")}


@pytest.fixture
def opened(models: dict[str, Any]) -> Iterator[Callable[..., tuple[KVCacheModel, DictStore]]]:
    """open(name, **options) -> (model, its store); all closed, and all leases ended, when the test ends."""
    made: list[tuple[KVCacheModel, DictStore]] = []

    def open_model(name: str = "llama_gqa", **options: Any) -> tuple[KVCacheModel, DictStore]:
        model = models[name]
        layout = model_layout(model, BLOCK)
        reuse = options.get("reuse", "exact")
        store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK, reuse=reuse))
        made.append((KVCacheModel(model, store, prefill_chunk=CHUNK, **options), store))
        return made[-1]

    yield open_model
    for model, store in made:
        model.close()
        assert not store.open_leases, "a lease was never ended"
