"""Answers that no next turn can begin with are not saved; nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from connectors.answers import SavedAnswers
from connectors.transformers import KVCacheModel, model_layout, model_namespace
from connectors.transformers.loading import chat_ids, load_model
from kvstore.prefix.answers import AnswerForm, AnswerRules, TurnRule
from tests.helpers.dict_models import BLOCK, CHUNK, NEW_TOKENS, ask, reused
from tests.helpers.dict_store import DictStore
from tests.helpers.replicas import make_model
from tests.helpers.tiny_models import random_ids
from tests.helpers.waiting import WAIT_S

KEEPS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
THINKS = KEEPS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # and no answer's history has that
ROUNDS, ANSWER_TOKENS = 3, 60


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(make_model(tmp_path_factory.mktemp("model") / "tiny")), "float32", 1)


@contextmanager
def opened_with(loaded: tuple[Any, Any], template: str, save: str) -> Iterator[tuple[KVCacheModel, DictStore]]:
    model, tokenizer = loaded
    tokenizer.chat_template = template
    layout = model_layout(model, BLOCK)
    store: Any = DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK, reuse="any"))
    with KVCacheModel(model, store, tokenizer=tokenizer, prefill_chunk=CHUNK, reuse="any", save=save) as cached:
        yield cached, store


def talk(model: KVCacheModel, tokenizer: Any) -> tuple[list[list[int]], int]:
    """A conversation: the tokens of each answer, and how many tokens were loaded."""
    messages: list[dict[str, str]] = []
    answers, hits = [], 0
    for number in range(ROUNDS):
        messages.append({"role": "user", "content": f"question {number} " * 4})
        said = model.generate(chat_ids(tokenizer, messages), ANSWER_TOKENS, eos=())
        assert model.flush(WAIT_S)
        messages.append({"role": "assistant", "content": said.text})
        answers.append(said.tokens)
        hits += reused(said)
    return answers, hits


def test_a_template_that_drops_reasoning_has_fewer_pages_and_the_same_tokens_and_hits(loaded: Any) -> None:
    told = {}
    for save in ("all", "auto", "prompt"):
        with opened_with(loaded, THINKS, save) as (model, store):
            told[save] = (*talk(model, loaded[1]), len(store.pages), model.connector.counters.unsaved_pages)
    without = KVCacheModel(loaded[0], tokenizer=loaded[1], prefill_chunk=CHUNK)

    answers, hits, pages, unsaved = told["auto"]
    assert answers == told["all"][0] == talk(without, loaded[1])[0]
    assert hits == told["all"][1] == told["prompt"][1] > 0
    assert pages == told["prompt"][2] < told["all"][2]
    assert unsaved >= told["all"][2] - pages > 0
    assert told["all"][3] == told["prompt"][3] == 0


def test_a_template_that_keeps_answers_has_them_all(loaded: Any) -> None:
    told = {}
    for save in ("all", "auto"):
        with opened_with(loaded, KEEPS, save) as (model, store):
            told[save] = (talk(model, loaded[1]), set(store.pages), model.connector.counters.unsaved_pages)

    assert told["auto"] == told["all"]
    assert told["auto"][2] == 0


def test_what_is_saved_is_logged_once_with_its_reason(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "connectors"), opened_with(loaded, THINKS, "auto") as (model, _):
        answers = model.connector.answers

    assert answers.told == "auto, no answer: the next prompt never begins with one (generation prompt not in history)"
    (line,) = [record.message for record in caplog.records if "decoded pages" in record.message]
    assert line == f"kvstore: decoded pages that are saved: {answers.told}"


def test_a_prompt_that_is_no_chat_is_saved_as_ever(loaded: Any) -> None:
    with opened_with(loaded, THINKS, "auto") as (model, store):
        said = model.generate(random_ids(60), ANSWER_TOKENS, eos=())
        assert model.flush(WAIT_S)

        assert len(store.pages) == (60 + ANSWER_TOKENS - 1) // BLOCK
        assert said.report.unsaved_pages == 0


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_verdict_in_the_middle_of_an_answer_loses_no_page_and_saves_none_too_many(opened: Any, name: str) -> None:
    plain, _ = opened(name, reuse="any", save="prompt")
    ids = random_ids(60)
    expected = plain.generate(ids, 3 * BLOCK, eos=()).tokens
    tail = (ids[-1],)
    for kept, fills in (
        (AnswerForm(tuple(expected[:20]), False), True),  # known at the 20th token: a block was filled before
        (AnswerForm((*expected[:20], expected[20] ^ 1), False), False),
        (AnswerForm((), False, tuple(expected[30:32])), True),
        (AnswerForm((), False, (255, 255, 255)), False),
    ):
        model, store = opened(name, reuse="any", save="all")
        rules = AnswerRules((TurnRule(tail, False, (kept,)),), (), "")
        model.connector.answers = SavedAnswers("auto", rules, "all")

        said = model.generate(ids, 3 * BLOCK, eos=())
        assert model.flush(WAIT_S)

        assert said.tokens == expected
        blocks = len({block for block, _ in store.pages})
        assert blocks == ((60 + 3 * BLOCK - 1) // BLOCK if fills else 60 // BLOCK)
        assert (said.report.unsaved_pages == 0) == fills
        again = ask(model, [*ids, *said.tokens])
        assert reused(again) == blocks * BLOCK
        assert again.tokens == plain.generate([*ids, *expected], NEW_TOKENS).tokens


def test_exact_mode_saves_no_answer_and_asks_no_template(opened: Any, tmp_path: Path) -> None:
    model, _ = opened()

    assert model.connector.answers.told == "prompt"
