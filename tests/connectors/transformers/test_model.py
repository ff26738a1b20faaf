"""KVCacheModel: answers, streams, ends and reports, with and without a store."""

import gc
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from connectors.base import Connector
from connectors.transformers import KVCacheModel, Piece, Sampling, UnsupportedModel
from connectors.transformers.cache import Span
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from connectors.transformers.loads import Loaded
from kvstore.errors import ConfigError, RequestError, StoreForked
from tests.helpers.dict_store import DictStore
from tests.helpers.tiny_models import MAX_TOKENS, random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32


class LetterTokenizer:
    """Token i is the character number 0x100 + i: every token is one visible letter."""

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) - 0x100 for letter in text])

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(0x100 + token) for token in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama_gqa")


@pytest.fixture(scope="module")
def cold(model: Any) -> KVCacheModel:
    return KVCacheModel(model, tokenizer=LetterTokenizer(), prefill_chunk=CHUNK)


def dict_store(model: Any, **options: Any) -> Any:
    layout = model_layout(model, BLOCK)
    return DictStore(layout, model_namespace(model, layout, prefill_chunk=CHUNK, **options))


def test_without_a_store_the_tokens_are_those_of_transformers_own_generate(model: Any) -> None:
    import torch

    whole = KVCacheModel(model, prefill_chunk=1024)
    ids = random_ids(100)

    expected = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 100), max_new_tokens=20, do_sample=False, pad_token_id=0
    )

    assert whole.generate(ids, 20).tokens == expected[0, 100:].tolist()


def test_logits_of_all_computed_tokens_are_those_of_the_model(model: Any) -> None:
    import torch

    ids = random_ids(70)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits

    prefill = KVCacheModel(model, prefill_chunk=1024).prefill(ids, all_logits=True)

    assert torch.equal(prefill.logits, expected)
    assert prefill.cache.get_seq_length() == 70


def test_pieces_stream_one_by_one_and_add_up_to_the_answer(cold: KVCacheModel) -> None:
    ids = random_ids(50)
    seen: list[Piece] = []

    answer = cold.generate(ids, 12, on_piece=seen.append)
    stream = cold.start(ids, 12)
    pieces = list(stream)

    assert pieces == seen
    assert [piece.token for piece in pieces] == answer.tokens == stream.result.tokens
    assert "".join(piece.text for piece in pieces) == answer.text == stream.result.text
    assert len(answer.text) == 12
    assert answer.finish_reason == "length"


def test_a_prompt_may_be_text(cold: KVCacheModel) -> None:
    ids = random_ids(50)
    text = LetterTokenizer().decode(ids, skip_special_tokens=True)

    assert cold.generate(text, 5).tokens == cold.generate(ids, 5).tokens


def test_an_end_token_ends_the_answer_and_is_part_of_its_tokens(cold: KVCacheModel) -> None:
    ids = random_ids(50)
    free = cold.generate(ids, 12).tokens
    end = free[4]
    first = free.index(end)

    for eos in (end, [end], (end, 9999)):
        answer = cold.generate(ids, 12, eos=eos)
        assert answer.tokens == free[: first + 1]
        assert answer.finish_reason == "stop"


def test_the_models_own_end_token_counts_unless_others_are_named(model: Any, cold: KVCacheModel) -> None:
    ids = random_ids(50)
    free = cold.generate(ids, 12).tokens
    model.generation_config.eos_token_id = [free[2]]
    try:
        assert cold.generate(ids, 12).tokens == free[: free.index(free[2]) + 1]
        assert cold.generate(ids, 12, eos=[]).tokens == free
    finally:
        model.generation_config.eos_token_id = None


def test_a_stop_string_ends_the_answer_and_is_no_part_of_its_text(cold: KVCacheModel) -> None:
    ids = random_ids(50)
    free = cold.generate(ids, 12)
    stop = free.text[5:7]
    cut = free.text.index(stop)

    stream = cold.start(ids, 12, stop=[stop])
    text = "".join(piece.text for piece in stream)

    assert text == stream.result.text == free.text[:cut]
    assert stream.result.finish_reason == "stop"
    assert stream.result.tokens == free.tokens[: cut + 2]


def test_text_held_back_for_a_stop_string_comes_with_the_last_piece(cold: KVCacheModel) -> None:
    ids = random_ids(50)
    free = cold.generate(ids, 12)

    answer = cold.generate(ids, 12, stop=[free.text[-2:] + "never"])

    assert answer.text == free.text
    assert answer.finish_reason == "length"


def test_a_stream_that_is_left_early_still_saves_and_ends_the_request(model: Any) -> None:
    store = dict_store(model)
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        with opened.start(random_ids(100), 12) as stream:
            next(stream)
            next(stream)
        assert opened.flush(WAIT_S)

        assert stream.result.finish_reason == "cancelled"
        assert len(stream.result.tokens) == 2
        assert len(store.pages) == 6
        assert store.finishes == [("cancelled", False)]
        assert store.replies == [2]


def test_a_stream_that_is_dropped_ends_the_request_too(model: Any) -> None:
    store = dict_store(model)
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        stream = opened.start(random_ids(100), 12)
        next(stream)
        del stream
        gc.collect()
        assert opened.flush(WAIT_S)

    assert store.finishes == [("cancelled", False)]


def test_a_stream_that_never_starts_computes_nothing(model: Any) -> None:
    store = dict_store(model)
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        opened.start(random_ids(100), 12).close()

    assert store.calls["request"] == 0


def test_the_report_says_where_every_token_came_from(model: Any) -> None:
    with KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK) as opened:
        ids = random_ids(100)
        first = opened.generate(ids, 8).report
        assert opened.flush(WAIT_S)
        second = opened.generate(ids, 8).report

    assert first.sources == {"host": 0, "disk": 0, "redis": 0, "computed": 100}
    assert second.sources == {"host": 96, "disk": 0, "redis": 0, "computed": 4}
    for report in (first, second):
        assert report.prompt_tokens == 100
        assert report.new_tokens == 8
        assert 0 < report.prefill_s <= report.ttft_s
        assert report.load_s <= report.ttft_s
        assert report.cpu_s > 0
        assert report.prefill_tokens_per_s == pytest.approx(report.computed_tokens / report.prefill_s)
        assert report.decode_tokens_per_s == pytest.approx(7 / report.decode_s)


def test_a_prompt_shorter_than_a_block_is_computed_and_nothing_is_saved(model: Any, cold: KVCacheModel) -> None:
    store = dict_store(model)
    with KVCacheModel(model, store, prefill_chunk=CHUNK) as opened:
        for length in (1, 2, 15):
            ids = random_ids(length)
            assert opened.generate(ids, 4).tokens == cold.generate(ids, 4).tokens
        assert opened.flush(WAIT_S)

    assert store.pages == {}
    assert store.calls["prepare_load"] == store.calls["prepare_save"] == 0


def test_sampling_with_a_seed_is_the_same_with_the_store_as_without(model: Any, cold: KVCacheModel) -> None:
    ids = random_ids(100)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=7)
    expected = cold.generate(ids, 16, sampling=sampling).tokens
    with KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK) as opened:
        first = opened.generate(ids, 16, sampling=sampling)
        assert opened.flush(WAIT_S)
        second = opened.generate(ids, 16, sampling=sampling)

    assert first.tokens == second.tokens == expected
    assert second.report.reused_tokens == 96
    assert expected != cold.generate(ids, 16).tokens


def test_a_cache_from_prefill_can_be_continued_while_its_blocks_are_saved(model: Any) -> None:
    import torch

    with KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK) as opened:
        ids = random_ids(100)
        first = opened.prefill(ids)
        token = int(first.logits[0, -1].argmax())
        with torch.inference_mode():
            logits = model(
                torch.tensor([[token]]), past_key_values=first.cache, position_ids=torch.tensor([[100]])
            ).logits
        assert opened.flush(WAIT_S)
        again = opened.generate(ids, 2)

    assert again.tokens == [token, int(logits[0, -1].argmax())]
    assert again.report.reused_tokens == 96


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
        },
    ],
)
def test_prompts_whose_positions_depend_on_their_length_are_kept_out_of_the_store(rope: dict[str, Any]) -> None:
    import torch

    own = tiny_model("llama_gqa", rope_parameters=rope, max_position_embeddings=128)
    store = dict_store(own)
    with KVCacheModel(own, store, prefill_chunk=CHUNK) as opened:
        short, long = random_ids(100), random_ids(200)
        opened.generate(short, 4)
        assert opened.flush(WAIT_S)
        pages = len(store.pages)

        answer = opened.prefill(long, all_logits=True)
        with torch.inference_mode():
            expected = own(torch.tensor([long])).logits

    assert torch.equal(answer.logits, expected)  # in one piece, as transformers does
    assert answer.report.reused_tokens == 0
    assert pages == len(store.pages) == 6


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "empty"),
        ([256], {}, "vocabulary has 256"),
        ([0.5], {}, "float"),
        (np.zeros((2, 4), np.int64), {}, "one prompt is computed at a time"),
        ([1] * MAX_TOKENS, {"max_new_tokens": 2}, f"{MAX_TOKENS} positions"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"stop": [""]}, "empty string"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    cold: KVCacheModel, prompt: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        cold.start(prompt, **options)


@pytest.mark.parametrize(("prompt", "options"), [("text", {}), ([1], {"stop": ["x"]})])
def test_text_without_a_tokenizer_is_refused(model: Any, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        KVCacheModel(model).generate(prompt, 1, **options)


def test_a_chunk_of_zero_is_refused_without_a_store_too(model: Any) -> None:
    with pytest.raises(ConfigError, match="prefill_chunk is 0"):
        KVCacheModel(model, prefill_chunk=0)


def test_unknown_model_types_are_checked_before_they_are_trusted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import connectors.transformers.model as module

    checked: list[Any] = []

    def check(own: Any) -> Any:
        checked.append(own)
        raise UnsupportedModel("does not resume")

    monkeypatch.setattr(module, "check_engine", check)
    KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK).close()
    assert checked == []

    with pytest.raises(UnsupportedModel, match="does not resume"):
        KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK, self_check=True)
    monkeypatch.setattr(model.config, "model_type", "unheard_of")
    with pytest.raises(UnsupportedModel, match="does not resume"):
        KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK)
    assert checked == [model, model]


def test_the_connector_keeps_the_protocol(model: Any) -> None:
    with KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK) as opened:
        connector: Connector[Loaded, Sequence[Span]] | None = opened.connector  # mypy compares the signatures

        verbs = [name for name in vars(Connector) if not name.startswith("_")]
        assert len(verbs) == 6
        assert all(callable(getattr(connector, verb)) for verb in verbs)


def test_a_forked_child_is_told_at_once_and_the_parent_goes_on(model: Any) -> None:
    kv = KVCacheModel(model, dict_store(model), prefill_chunk=CHUNK)
    ids = random_ids(40, seed=3)
    expected = kv.generate(ids, max_new_tokens=2).tokens
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            kv.generate(ids, max_new_tokens=2)
        except StoreForked:
            kv.close()
            code = 0
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert kv.generate(ids, max_new_tokens=2).tokens == expected
    kv.close()
