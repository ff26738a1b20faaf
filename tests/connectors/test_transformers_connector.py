"""The connector over a dict: what it asks of a store, and that nothing a store does can reach the model."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from connectors.transformers_connector import TransformersConnector
from connectors.transformers_identity import model_namespace
from connectors.transformers_layout import model_layout
from kvstore.errors import ConfigError, LayoutMismatch, RequestError
from kvstore.plan.records import RequestOptions
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import random_ids, tiny_model

BLOCK = 16
CHUNK = 32
NEW_TOKENS = 6


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


def ask(model: KVCacheModel, ids: list[int], **options: Any) -> Any:
    """Generate, and wait until the saves are done."""
    answer = model.generate(ids, NEW_TOKENS, **options)
    assert model.flush(10.0)
    return answer


def reused(answer: Any) -> int:
    return int(answer.report.reused_tokens)


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mistral"])
def test_exact_hits_end_on_chunk_boundaries_and_leave_a_token(opened: Any, name: str) -> None:
    model, _ = opened(name)
    ids = random_ids(200)
    ask(model, ids)

    assert [reused(ask(model, ids[:n])) for n in (31, 32, 33, 64, 65, 100, 192, 193, 200)] == [
        0, 0, 32, 32, 64, 96, 160, 192, 192,
    ]  # fmt: skip


def test_exact_mode_saves_only_what_full_chunks_computed(opened: Any) -> None:
    model, store = opened()

    ask(model, random_ids(110))

    assert len(store.pages) == 96 // BLOCK


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mistral"])
def test_any_mode_saves_decoded_blocks_and_reuses_every_block(opened: Any, name: str) -> None:
    model, store = opened(name, reuse="any")
    ids = random_ids(60)
    first = ask(model, ids)

    again = ask(model, [*ids, *first.tokens])

    # 60 prompt tokens and 5 of the 6 new ones were fed: 4 blocks, the last of them filled while decoding.
    assert reused(again) == 64
    assert {block for block, _ in store.pages}.__len__() == 4


def test_any_mode_may_leave_decoded_blocks_out(opened: Any) -> None:
    model, store = opened(reuse="any", save_decode=False)

    ask(model, random_ids(60))

    assert len(store.pages) == 3


def test_saving_decoded_blocks_is_refused_in_exact_mode(opened: Any) -> None:
    with pytest.raises(ConfigError, match="save_decode is True with reuse 'exact'"):
        opened(save_decode=True)


def test_new_blocks_are_saved_behind_those_that_were_loaded(opened: Any) -> None:
    model, store = opened()
    ids = random_ids(200)
    ask(model, ids[:100])
    pages = dict(store.pages)

    ask(model, ids)

    assert store.calls["prepare_save"] == 2
    assert len(pages) == 6
    assert len(store.pages) == 12
    assert all(store.pages[key] == raw for key, raw in pages.items())


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
@pytest.mark.parametrize("lost", [(0, 0), (3, 0), (5, 0), (11, 0)])
def test_a_page_lost_on_its_way_costs_only_what_comes_after_it(opened: Any, name: str, lost: tuple[int, int]) -> None:
    model, store = opened(name)
    cold = KVCacheModel(model.model, prefill_chunk=CHUNK)
    ids = random_ids(200)
    ask(model, ids)
    store.lost = {(lost[0], group) for group in range(len(store.layout.groups))}

    answer = ask(model, ids)

    assert answer.tokens == cold.generate(ids, NEW_TOKENS).tokens
    assert reused(answer) == lost[0] * BLOCK // CHUNK * CHUNK
    assert model.connector is not None
    assert model.connector.counters.short_loads == 1
    assert model.connector.counters.load_failures == 0


def test_a_shorter_lease_of_a_sliding_model_is_asked_for_again_at_the_boundary_below(opened: Any) -> None:
    model, store = opened("gemma3")
    ids = random_ids(200)
    ask(model, ids)
    full = next(g for g, group in enumerate(store.layout.groups) if group.window is None)
    # Without block 9 of the full layers the store can resume after 9 blocks, but no chunk ends there; and of the
    # sliding layers this lease has only blocks 9 to 11.
    store.lost = {(9, full)}

    answer = ask(model, ids)

    assert reused(answer) == 8 * BLOCK
    assert store.calls["prepare_load"] == 2
    assert answer.tokens == KVCacheModel(model.model, prefill_chunk=CHUNK).generate(ids, NEW_TOKENS).tokens


@pytest.mark.parametrize(("name", "expected"), [("llama_gqa", 64), ("gemma3", 0)])
def test_at_the_deadline_what_is_there_is_used_and_nothing_more_is_asked_for(
    opened: Any, name: str, expected: int
) -> None:
    model, store = opened(name)
    ids = random_ids(200)
    ask(model, ids)
    store.late = True
    store.lost = {(5, group) for group in range(len(store.layout.groups))}

    answer = ask(model, ids)

    assert reused(answer) == expected
    assert store.calls["prepare_load"] == 1
    assert answer.tokens == KVCacheModel(model.model, prefill_chunk=CHUNK).generate(ids, NEW_TOKENS).tokens


def test_all_attempts_of_a_load_share_one_deadline(opened: Any) -> None:
    model, store = opened("gemma3", load_deadline_s=30.0)
    ids = random_ids(200)
    ask(model, ids)
    waits: list[float] = []
    plain = store.wait

    def wait(lease: Any, timeout_s: float) -> Any:
        waits.append(timeout_s)
        return plain(lease, timeout_s)

    store.wait = wait
    store.lost = {(9, group) for group in range(len(store.layout.groups))}

    assert reused(ask(model, ids)) == 8 * BLOCK
    assert len(waits) == 2
    assert 30.0 >= waits[0] > waits[1] > 0.0


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


def test_saves_that_find_no_queue_are_skipped_and_counted(opened: Any) -> None:
    model, store = opened()
    connector = model.connector
    assert connector is not None
    gate, blocked = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        gate.wait(10)

    connector._worker.submit(block)
    assert blocked.wait(10)
    while connector._worker.submit(lambda: None):
        pass

    answer = model.generate(random_ids(100), NEW_TOKENS)
    gate.set()
    assert model.flush(10.0)

    assert len(answer.tokens) == NEW_TOKENS
    assert connector.counters.skipped_saves == 1
    assert store.pages == {}
    assert store.finishes == [("length", False)]  # told all the same


def test_pages_without_a_slot_are_skipped_and_counted(opened: Any) -> None:
    model, store = opened()
    store.max_slots = 2

    ask(model, random_ids(100))

    assert model.connector.counters.saved_pages == len(store.pages) == 2
    assert model.connector.counters.skipped_pages == 4
    assert reused(ask(model, random_ids(100))) == 32


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


@pytest.mark.parametrize(("last_turn", "reason"), [(True, "length"), (False, "length")])
def test_the_store_is_told_how_a_request_ended(opened: Any, last_turn: bool, reason: str) -> None:
    model, store = opened()

    ask(model, random_ids(40), last_turn=last_turn)

    assert store.finishes == [(reason, last_turn)]


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


def test_forget_waits_for_saves_under_way(opened: Any) -> None:
    model, store = opened()
    ids = random_ids(100)
    model.generate(ids, NEW_TOKENS)

    assert model.forget(ids) == 6
    assert store.pages == {}


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
