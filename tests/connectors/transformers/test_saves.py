import threading
from typing import Any

import pytest

from tests.helpers.dict_models import BLOCK, NEW_TOKENS, ask, reused
from tests.helpers.tiny_models import random_ids
from tests.helpers.waiting import WAIT_S


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
    model, store = opened(reuse="any", save="prompt")

    ask(model, random_ids(60))

    assert len(store.pages) == 3


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


def test_saves_that_find_no_queue_are_skipped_and_counted(opened: Any) -> None:
    model, store = opened()
    connector = model.connector
    assert connector is not None
    gate, blocked = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        gate.wait(WAIT_S)

    connector.saves._worker.submit(block)
    assert blocked.wait(WAIT_S)
    while connector.saves._worker.submit(lambda: None):
        pass

    answer = model.generate(random_ids(100), NEW_TOKENS)
    gate.set()
    assert model.flush(WAIT_S)

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


@pytest.mark.parametrize(("last_turn", "reason"), [(True, "length"), (False, "length")])
def test_the_store_is_told_how_a_request_ended(opened: Any, last_turn: bool, reason: str) -> None:
    model, store = opened()

    answer = ask(model, random_ids(40), last_turn=last_turn)

    assert store.finishes == [(reason, last_turn)]
    assert store.replies == [answer.report.new_tokens]


def test_forget_waits_for_saves_under_way(opened: Any) -> None:
    model, store = opened()
    ids = random_ids(100)
    model.generate(ids, NEW_TOKENS)

    assert model.forget(ids) == 6
    assert store.pages == {}
