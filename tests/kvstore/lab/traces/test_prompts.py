"""A log of one's own prompts, as text or token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.lab.traces import ReplayTrace, read_trace


def read(tmp_path: Path, *records: dict[str, Any], **options: Any) -> ReplayTrace:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_trace(path, **options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token a word, and a chat template."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<unk>", "<bos>", "user", "assistant", "hello", "there", "again"]
    model = tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<bos>")
    fast.chat_template = "<bos>{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %} assistant"
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return str(folder)


def test_full_blocks_of_token_ids_are_counted_and_tenants_are_apart(tmp_path: Path) -> None:
    trace = read(
        tmp_path,
        {"timestamp": 0, "token_ids": list(range(9)), "session": "a", "output_tokens": 5, "finish_reason": "stop"},
        {"timestamp": 1, "token_ids": [*range(8), 9, 9, 9, 9], "session": "b"},
        {"timestamp": 2, "token_ids": list(range(8)), "tenant": "other", "user": "a"},
        block_tokens=4,
    )

    assert [request.blocks for request in trace.requests] == [(0, 1), (0, 1, 2), (3, 4)]
    assert [request.session for request in trace.requests] == [0, 1, 0]
    assert [request.num_prompt_tokens for request in trace.requests] == [9, 12, 8]
    assert (trace.requests[0].num_answer_tokens, trace.requests[0].finish_reason) == (5, "stop")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (1764500000.25, 1764500000.25),
        (1764500000250, 1764500000.25),
        (1764500000250000, 1764500000.25),
        ("2025-11-30T10:53:20.250Z", 1764500000.25),
        ("2025-11-30T11:53:20.250+01:00", 1764500000.25),
        (12.5, 12.5),
    ],
)
def test_a_time_is_seconds_or_smaller_units_or_iso(tmp_path: Path, written: Any, seconds: float) -> None:
    trace = read(tmp_path, {"timestamp": written, "token_ids": [1]})

    assert trace.requests[0].at_s == pytest.approx(seconds)


def test_text_and_messages_go_through_the_models_own_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    trace = read(
        tmp_path,
        {"timestamp": 0, "prompt": "hello there again"},
        {"timestamp": 1, "messages": [{"role": "user", "content": "hello there"}]},
        {"timestamp": 2, "token_ids": [1, 2, 4, 5, 3]},
        block_tokens=1,
        tokenizer=tokenizer,
    )

    assert trace.requests[0].num_prompt_tokens == 3
    assert trace.requests[1].blocks == trace.requests[2].blocks


def test_text_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts as text: give --tokenizer DIR_OR_ID"):
        read(tmp_path, {"timestamp": 0, "prompt": "hello"})
    with pytest.raises(ConfigError, match=r"--tokenizer .*nothing cannot be loaded"):
        read(tmp_path, {"timestamp": 0, "prompt": "hello"}, tokenizer=str(tmp_path / "nothing"))


def test_a_broken_prompt_is_told_with_its_line_or_counted(tmp_path: Path) -> None:
    records = [
        {"timestamp": 0, "token_ids": [1]},
        {"timestamp": 1, "token_ids": [-1]},
        {"timestamp": 2, "token_ids": []},
    ]

    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: expected a request .token_ids must be a list of numbers"):
        read(tmp_path, *records)
    trace = read(tmp_path, *records, skip_bad=True)
    assert (len(trace.requests), trace.num_skipped) == (2, 1)


@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=8))
def test_prompts_share_the_blocks_of_their_common_head_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]
) -> None:
    records = [{"timestamp": at, "token_ids": tokens} for at, tokens in enumerate(prompts)]

    trace = read(tmp_path_factory.mktemp("log"), *records, block_tokens=2)

    for one, tokens in zip(trace.requests, prompts, strict=True):
        for other, others in zip(trace.requests, prompts, strict=True):
            for end in range(min(len(one.blocks), len(other.blocks))):
                is_same = tokens[: 2 * end + 2] == others[: 2 * end + 2]
                assert (one.blocks[end] == other.blocks[end]) is is_same
