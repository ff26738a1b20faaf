"""Traces of three formats, as files have them, and what is told of broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kvstore.errors import ConfigError
from kvstore.lab.traces import read_trace

KVT: list[dict[str, Any]] = [
    {"format": "kvt1", "block_tokens": 4, "name": "made up"},
    {"t": 1.0, "s": 5, "in": 10, "out": 3, "p": -1, "k": 0, "h": [[0, 3]]},
    {"t": 1.5, "s": 6, "in": 8, "out": 2, "p": 0, "k": 1, "h": [[3, 1]]},
    {"t": 2.5, "s": 5, "in": 19, "out": 9, "p": 0, "k": 2, "h": [[7, 1], [20, 2]]},
]
MOONCAKE: list[dict[str, Any]] = [
    {"timestamp": 0, "input_length": 1030, "output_length": 52, "hash_ids": [0, 1, 2]},
    {"timestamp": 2500, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]},
]
BAILIAN: list[dict[str, Any]] = [
    {
        "chat_id": 159,
        "parent_chat_id": -1,
        "timestamp": 61.5,
        "input_length": 33,
        "output_length": 7,
        "type": "text",
        "turn": 1,
        "hash_ids": [8, 2**40, 10],
    }
]


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize(("suffix", "pack"), [(".zst", zstandard.compress), (".gz", gzip.compress), ("", bytes)])
def test_a_kvt_file_is_read_compressed_or_not(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"made.kvt{suffix}"
    path.write_bytes(pack(lines(KVT)))

    trace = read_trace(path)

    assert (trace.name, trace.block_tokens, trace.num_distinct, trace.prompt_tokens) == ("made up", 4, 7, 37)
    assert [request.blocks for request in trace.requests] == [(0, 1, 2), (0, 3), (0, 1, 7, 20, 21)]
    assert read_trace(path, max_requests=2).requests == trace.requests[:2]


def test_a_mooncake_file_counts_in_milliseconds_and_blocks_of_512(tmp_path: Path) -> None:
    path = tmp_path / "conversation_trace.jsonl"
    path.write_bytes(lines(MOONCAKE))

    trace = read_trace(path)

    assert (trace.name, trace.block_tokens) == ("conversation_trace", 512)
    assert [(request.at_s, request.num_prompt_tokens, request.blocks) for request in trace.requests] == [
        (0.0, 1030, (0, 1, 2)),
        (2.5, 1024, (0, 1)),
    ]


def test_a_bailian_file_counts_in_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    path = tmp_path / "qwen.jsonl"
    path.write_bytes(lines(BAILIAN))

    trace = read_trace(path)

    (request,) = trace.requests
    assert (trace.block_tokens, request.at_s, request.session, request.blocks) == (16, 61.5, 159, (0, 1, 2))


def test_an_id_that_names_its_block_alone_counts_with_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "by_content.jsonl"
    prompts = ([7, 7, 8], [7, 8], [8, 7], [7, 7, 8])
    path.write_bytes(
        lines(
            [{"timestamp": 0, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids} for ids in prompts]
        )
    )

    assert [request.blocks for request in read_trace(path).requests] == [(0, 1, 2), (0, 3), (4, 5), (0, 1, 2)]


def test_another_block_size_is_given_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines([{"timestamp": 0, "input_length": 65, "output_length": 1, "hash_ids": [5, 6]}]))

    assert read_trace(path, block_tokens=64).block_tokens == 64
    with pytest.raises(ConfigError, match=r"mine\.jsonl:1: .*2 hash_ids for .* blocks of 512 tokens are 1"):
        read_trace(path)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("{", "one JSON object a line"),
        ("[]", "one JSON object a line"),
        ('{"timestamp": 3000, "input_length": 5, "output_length": 1}', "'hash_ids' is missing"),
        ('{"timestamp": 3000, "input_length": -5, "output_length": 1, "hash_ids": []}', "input_length is -5"),
        ('{"timestamp": 3000, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}', "list of numbers"),
        ('{"timestamp": "x", "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp is 'x'"),
    ],
)
def test_a_broken_line_is_told_or_left_out_and_counted(tmp_path: Path, broken: str, told: str) -> None:
    path = tmp_path / "t.jsonl"
    later = {"timestamp": 4000, "input_length": 5, "output_length": 1, "hash_ids": [9]}
    path.write_bytes(lines(MOONCAKE) + broken.encode() + b"\n" + lines([later]))

    with pytest.raises(ConfigError, match=rf"t\.jsonl:3: .*{told}"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    assert (len(trace.requests), trace.num_skipped) == (3, 1)


@pytest.mark.parametrize(
    ("ids", "timestamp", "told"),
    [
        ([0, 1, 2], "NaN", "timestamp is nan"),
        ([0, 1, 2], "1" + 400 * "0", "too large"),
    ],
)
def test_a_line_that_no_store_can_have_seen_is_told(tmp_path: Path, ids: list[int], timestamp: str, told: str) -> None:
    path = tmp_path / "trace.jsonl"
    line = json.dumps({**MOONCAKE[0], "timestamp": 0, "hash_ids": ids}).replace(
        '"timestamp": 0', f'"timestamp": {timestamp}'
    )
    path.write_bytes(lines(MOONCAKE[:1]) + line.encode() + b"\n")

    with pytest.raises(ConfigError, match=told):
        read_trace(path)
    assert read_trace(path, skip_bad=True).num_skipped == 1


def test_a_file_that_is_no_trace_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.kvt"
    for content, told in (
        (b'{"format": "other"}\n', "a.kvt:1: expected the first line of a trace .kvt1: .*; mooncake: .*; bailian: "),
        (b"hello\n", "a.kvt:1: expected the first line of a trace"),
        (b"", "a.kvt is empty"),
        (b"\n", "a.kvt is empty"),
        (lines(KVT[:1]), "no request in it"),
        (lines([MOONCAKE[1], MOONCAKE[0]]), "request 2 came at 0 s, before the one above it at 2.5 s"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            read_trace(path)


def test_a_compressed_file_that_ends_early_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(lines(MOONCAKE * 1))[:-20])

    with pytest.raises(ConfigError, match="does not decompress"):
        read_trace(path)


def test_a_capacity_of_nothing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "made.kvt"
    path.write_bytes(lines(KVT))

    assert read_trace(path).blocks_of(0.5) == 3
    with pytest.raises(ConfigError, match="capacity is 0"):
        read_trace(path).blocks_of(0)
