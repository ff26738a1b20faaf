from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kvstore.errors import ConfigError
from kvstore.load.requests import COMPLETIONS, Workload
from kvstore.load.trace import Trace

HEADER = {"format": "kvt1", "block_tokens": 4, "name": "made up", "requests": 4}
LINES: list[dict[str, Any]] = [
    {"t": 1.0, "s": 5, "y": "", "in": 10, "out": 3, "p": -1, "k": 0, "h": [[0, 3]]},
    {"t": 1.5, "s": 6, "y": "", "in": 8, "out": 2, "p": 0, "k": 1, "h": [[3, 1]]},
    {"t": 2.5, "s": 5, "y": "", "in": 19, "out": 9, "p": 0, "k": 2, "h": [[7, 1], [20, 1]]},
    {"t": 4.0, "s": -1, "y": "", "in": 5, "out": 1, "p": 2, "k": 4, "h": []},
]
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "made.kvt.zst"
    path.write_bytes(zstandard.compress("\n".join(map(json.dumps, (HEADER, *LINES))).encode()))
    return path


def ids(workload: Workload, number: int) -> list[int]:
    body = workload.body(workload.requests[number], {}, COMPLETIONS)
    assert body is not None
    return list(body["prompt"])


def shared(a: list[int], b: list[int]) -> int:
    """Length of the common head."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_prompts_share_the_blocks_that_the_trace_says(trace: Path) -> None:
    workload = Trace(trace).make(0)
    made = [ids(workload, number) for number in range(4)]

    assert [len(tokens) for tokens in made] == [10, 8, 19, 5]
    assert shared(made[0], made[1]) == 4
    assert shared(made[0], made[2]) == 8
    assert shared(made[2], made[3]) == 5


def test_tokens_depend_on_block_and_seed_only(trace: Path) -> None:
    first, again, other = Trace(trace).make(1), Trace(trace).make(1), Trace(trace).make(2)

    assert first == again
    assert ids(first, 2) == ids(again, 2)
    assert shared(ids(first, 2), ids(other, 2)) == 0


def test_tail_beyond_the_blocks_is_each_requests_own(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "tails.kvt"
    line = {"t": 0, "s": -1, "in": 11, "out": 1, "p": -1, "k": 0, "h": [[0, 2]]}
    path.write_text("\n".join(map(json.dumps, (HEADER, line, {**line, "p": 0, "k": 2, "h": []}))))

    workload = Trace(path).make(0)

    assert len(ids(workload, 0)) == len(ids(workload, 1)) == 11
    assert shared(ids(workload, 0), ids(workload, 1)) == 8


def test_long_prompts_and_answers_are_cut_at_the_end(trace: Path) -> None:
    whole, cut = Trace(trace).make(0), Trace(trace, max_prompt_tokens=6, max_answer_tokens=2).make(0)

    assert [ids(cut, number) for number in range(4)] == [ids(whole, number)[:6] for number in range(4)]
    assert [request.answer_tokens for request in cut.requests] == [2, 2, 2, 1]


def test_smaller_blocks_shrink_prompts_and_answers_and_keep_what_is_shared(trace: Path) -> None:
    workload = Trace(trace, block_tokens=2).make(0)
    made = [ids(workload, number) for number in range(4)]

    assert [len(tokens) for tokens in made] == [5, 4, 10, 2]
    assert shared(made[0], made[1]) == 2
    assert shared(made[0], made[2]) == 4
    assert [request.answer_tokens for request in workload.requests] == [2, 1, 4, 1]


def test_token_ids_stay_below_the_vocabulary(trace: Path) -> None:
    workload = Trace(trace, vocab_size=256).make(0)

    every = [token for number in range(4) for token in ids(workload, number)]

    assert min(every) >= 64
    assert max(every) < 256


def test_requests_of_a_session_wait_for_the_one_they_continue(trace: Path) -> None:
    workload = Trace(trace).make(0)
    assert [request.after for request in workload.requests] == [None, None, 0, None]
    assert [request.last for request in workload.requests] == [False, True, True, True]
    assert list(map(workload.is_conversation, workload.requests)) == [True, False, True, False]


def test_only_the_first_requests_are_read(trace: Path) -> None:
    workload = Trace(trace, requests=2).make(0)

    assert len(workload.requests) == 2
    assert [request.at_s for request in workload.requests] == [1.0, 1.5]


def test_azure_file_gives_times_and_lengths_and_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)

    workload = Trace(path).make(0)

    assert [len(ids(workload, number)) for number in (0, 1)] == [374, 396]
    assert [request.answer_tokens for request in workload.requests] == [44, 64]
    assert workload.requests[1].at_s == pytest.approx(4.314579)
    assert shared(ids(workload, 0), ids(workload, 1)) == 0


def test_example_of_the_documentation_is_a_trace(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    example = next(part for part in text.split("```") if part.lstrip().startswith('{"format": "kvt1"'))
    path = tmp_path / "example.kvt"
    path.write_text(example.strip() + "\n")

    workload = Trace(path).make(0)

    assert [len(ids(workload, number)) for number in (0, 1)] == [100, 150]
    assert shared(ids(workload, 0), ids(workload, 1)) == 96
    assert workload.requests[1].after == 0


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in LINES[1].items() if key != name}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", "a JSON object"),
        ("[1]", "a JSON object"),
        (json.dumps(without("in")), '"in"'),
        (json.dumps({**LINES[1], "p": 1}), '"p" as an earlier request, -1 to 0'),
        (json.dumps({**LINES[1], "h": [[1]]}), r'"h" as a list of \[first id, count\]'),
        (json.dumps({**LINES[1], "k": -3}), "negative"),
        (json.dumps({**LINES[1], "t": "soon"}), '"t"'),
    ],
)
def test_broken_line_is_told_with_file_line_and_what_was_expected(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "broken.kvt"
    path.write_text("\n".join((json.dumps(HEADER), json.dumps(LINES[0]), line)))

    with pytest.raises(ConfigError, match=f"broken.kvt:3: expected .*{expected}"):
        Trace(path).make(0)


@pytest.mark.parametrize("first", ["", "hello", '{"format": "kvt2"}', '{"format": "kvt1", "block_tokens": 0}', "[]"])
def test_file_that_is_no_trace_is_told_what_one_looks_like(tmp_path: Path, first: str) -> None:
    path = tmp_path / "none.kvt"
    path.write_text(first)

    with pytest.raises(ConfigError, match=r"none.kvt:1: expected a kvt1 header .* TIMESTAMP"):
        Trace(path).make(0)


def test_broken_row_of_an_azure_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + "yesterday,3,4\n")

    with pytest.raises(ConfigError, match=r"azure.csv:4: expected a row of TIMESTAMP,.* found 'yesterday,3,4'"):
        Trace(path).make(0)


def test_file_that_does_not_decompress_is_told(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "half.kvt.zst"
    path.write_bytes(b"not zstd at all")

    with pytest.raises(ConfigError, match="does not decompress"):
        Trace(path).make(0)


def test_header_alone_is_told(tmp_path: Path) -> None:
    path = tmp_path / "empty.kvt"
    path.write_text(json.dumps(HEADER) + "\n")

    with pytest.raises(ConfigError, match="no request"):
        Trace(path).make(0)
