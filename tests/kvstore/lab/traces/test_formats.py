"""Every format round trip, and lines that no writer wrote: only a ConfigError that names the line comes out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.lab.traces import ReplayTrace, read_trace
from kvstore.lab.traces.kvt1 import write_kvt
from kvstore.lab.traces.registry import FORMATS
from kvstore.load.kvt import KvtRequest

BLOCK = 4
TEXT = st.text(max_size=8)
PROMPTS = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=12)


def numbered(prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Blocks that are named by all before them, as every reader gives them."""
    names: dict[tuple[int, ...], int] = {}
    return [
        tuple(names.setdefault(tuple(prompt[: end + 1]), len(names)) for end in range(len(prompt)))
        for prompt in prompts
    ]


def requests(prompts: list[list[int]]) -> tuple[KvtRequest, ...]:
    return tuple(
        KvtRequest(float(number), number % 3, -1, len(blocks) * BLOCK, 2, blocks)
        for number, blocks in enumerate(numbered(prompts))
    )


def shape(trace: ReplayTrace) -> list[tuple[Any, ...]]:
    return [(r.at_s, r.session, r.num_prompt_tokens, r.num_answer_tokens, r.blocks) for r in trace.requests]


def read_lines(name: str, lines: list[str], **options: Any) -> ReplayTrace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        return read_trace(path, format_name=name, **options)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, TEXT, TEXT, st.sampled_from(["", ".gz", ".zst"]))
def test_what_is_written_as_kvt1_is_read_again(prompts: list[list[int]], kind: str, reason: str, suffix: str) -> None:
    made = requests(prompts)
    made = (*made, KvtRequest(99.0, 7, -1, 1, 0, (), kind=kind, finish_reason=reason, turn=3, tenant=kind))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"made.kvt{suffix}"
        write_kvt(ReplayTrace("made", BLOCK, made), path)

        trace = read_trace(path)

    assert shape(trace) == shape(ReplayTrace("made", BLOCK, made))
    last = trace.requests[-1]
    assert (last.kind, last.finish_reason, last.turn, last.tenant) == (kind, reason, 3, kind)


@settings(max_examples=40, deadline=None)
@given(PROMPTS)
def test_mooncake_and_bailian_lines_are_read_as_they_are(prompts: list[list[int]]) -> None:
    for name, scale in (("mooncake", 1000), ("bailian", 1)):
        lines = [
            json.dumps(
                {
                    "timestamp": number * scale,
                    "input_length": len(prompt) * BLOCK,
                    "output_length": 2,
                    "hash_ids": prompt,
                    "chat_id": number,
                    "parent_chat_id": -1,
                    "turn": 1,
                }
            )
            for number, prompt in enumerate(prompts)
        ]

        trace = read_lines(name, lines, block_tokens=BLOCK)

        assert [request.blocks for request in trace.requests] == numbered(prompts)
        assert [request.at_s for request in trace.requests] == list(range(len(prompts)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("t", "s", "in", "out", "p", "k", "h", "y", "x", "n", "u", "format"),
    *("w", "hit", "l", "s", "block_tokens", "topic", "seq", "b", "prompt", "messages", "token_ids", "session"),
    *("timestamp", "input_length", "output_length", "hash_ids", "chat_id", "parent_chat_id", "turn", "type"),
]
LINES = (
    st.dictionaries(st.sampled_from(FIELDS), JSON | st.just(-1) | st.just([[0, 1]]), max_size=10).map(json.dumps)
    | JSON.map(json.dumps)
    | st.text(max_size=30)
)


@pytest.mark.parametrize("name", sorted(FORMATS))
@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINES, min_size=1, max_size=4), skip_bad=st.booleans())
def test_nothing_but_a_config_error_comes_of_any_line(name: str, lines: list[str], skip_bad: bool) -> None:
    told = "made.jsonl"
    try:
        read_lines(name, [*HEADERS.get(name, []), *lines], skip_bad=skip_bad, **OPTIONS.get(name, {}))
    except ConfigError as error:
        told = str(error)

    assert "made.jsonl" in told


HEADERS: dict[str, list[str]] = {
    "kvt1": ['{"format": "kvt1", "block_tokens": 4}'],
    "recording": [
        '{"format": "kvr1", "w": "a", "block_tokens": 4}',
        '{"w": "a", "t": 0, "in": 4, "out": 0, "h": "AAAAAAAAAAA="}',
    ],
    "events": ['{"format": "kve1"}'],
}
OPTIONS: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_zstd_file_that_was_cut_off_is_told(tmp_path: Path, cut: int) -> None:
    whole = tmp_path / "whole.kvt.zst"
    write_kvt(ReplayTrace("made", BLOCK, requests([[n % 7, n % 5, n % 3] for n in range(300)])), whole)
    path = tmp_path / "cut.kvt.zst"
    path.write_bytes(whole.read_bytes()[:-cut])

    with pytest.raises(ConfigError, match=r"does not decompress.*is it whole"):
        read_trace(path)


def test_compression_is_told_by_the_first_bytes_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "named.kvt"
    path.write_bytes(b"".join(zstandard.compress(part) for part in (HEADER_LINE, KVT_LINE)))  # two frames

    assert len(read_trace(path).requests) == 1


HEADER_LINE = b'{"format": "kvt1", "block_tokens": 4}\n'
KVT_LINE = b'{"t": 0, "s": 1, "in": 4, "out": 1, "p": -1, "k": 0, "h": [[0, 1]]}\n'


def test_a_broken_line_of_kvt1_is_left_out_with_those_that_continue_it() -> None:
    def line(parent: int, shared: int, first: int) -> str:
        return json.dumps({"t": 0, "s": 1, "in": 9, "out": 1, "p": parent, "k": shared, "h": [[first, 1]]})

    lines = [HEADER_LINE.decode().strip(), line(-1, 0, 0), "{", line(1, 1, 5), line(0, 1, 6)]

    trace = read_lines("kvt1", lines, skip_bad=True)

    assert [request.blocks for request in trace.requests] == [(0,), (0, 6)]
    assert trace.num_skipped == 2
    with pytest.raises(ConfigError, match=r"made\.jsonl:3: expected a JSON object"):
        read_lines("kvt1", lines)


def test_a_conversation_of_bailian_is_one_session_whatever_its_chats_are_called() -> None:
    def line(at: int, chat: int, parent: int) -> str:
        return json.dumps(
            {
                "timestamp": at,
                "chat_id": chat,
                "parent_chat_id": parent,
                "turn": at,
                "type": "text",
                "input_length": 0,
                "output_length": 1,
                "hash_ids": [],
            }
        )

    trace = read_lines("bailian", [line(1, 10, -1), line(2, 11, 10), line(3, 12, 11), line(4, 20, 5), line(5, 30, -1)])

    assert [request.session for request in trace.requests] == [10, 10, 10, 5, 30]
    assert [(request.turn, request.kind) for request in trace.requests[:2]] == [(1, "text"), (2, "text")]


def test_an_unknown_format_is_told_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")

    with pytest.raises(ConfigError, match="no trace format 'other'; there are kvt1, mooncake, bailian"):
        read_trace(path, format_name="other")
