"""The reader of kvt1; test_trace.py has what workloads make of it, and every kind of broken line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.load.kvt import KvtRequest, read_header, read_kvt

PATH = Path("made-up.kvt")


def test_a_request_has_the_head_of_an_earlier_one_and_runs_of_its_own() -> None:
    lines = io.StringIO(
        '{"t": 0.5, "s": -1, "in": 9, "out": 2, "p": -1, "k": 0, "h": [[4, 2], [9, 1]]}\n'
        '{"t": 1, "s": 7, "in": 12, "out": 3, "p": 0, "k": 2, "h": [[20, 1]]}\n'
    )

    assert list(read_kvt(PATH, lines)) == [
        KvtRequest(0.5, -1, -1, 9, 2, (4, 5, 9)),
        KvtRequest(1, 7, 0, 12, 3, (4, 5, 20)),
    ]


def test_a_broken_line_is_told_by_its_number_after_those_before_it_were_read() -> None:
    good = '{"t": 0, "s": 1, "in": 4, "out": 1, "p": -1, "k": 0, "h": [[0, 1]]}\n'
    requests = read_kvt(PATH, io.StringIO(good + "{}\n"))

    assert next(requests).blocks == (0,)
    with pytest.raises(ConfigError, match=r'made-up\.kvt:3: expected a number "t"'):
        next(requests)


def test_a_header_is_told_with_what_its_reader_takes() -> None:
    assert read_header(PATH, '{"format": "kvt1", "block_tokens": 16, "name": "n"}')["name"] == "n"
    with pytest.raises(ConfigError, match="expected this or that, found"):
        read_header(PATH, "no", expected="this or that")
