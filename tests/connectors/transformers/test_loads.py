from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from tests.helpers.dict_models import BLOCK, CHUNK, NEW_TOKENS, ask, reused
from tests.helpers.tiny_models import random_ids


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3", "mistral"])
def test_exact_hits_end_on_chunk_boundaries_and_leave_a_token(opened: Any, name: str) -> None:
    model, _ = opened(name)
    ids = random_ids(200)
    ask(model, ids)

    assert [reused(ask(model, ids[:n])) for n in (31, 32, 33, 64, 65, 100, 192, 193, 200)] == [
        0, 0, 32, 32, 64, 96, 160, 192, 192,
    ]  # fmt: skip


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
