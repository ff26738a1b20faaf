from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix.namespace import BlockHash
from radix.node import Run


def keys(text: str) -> list[BlockHash]:
    """One key per letter, not chained."""
    return [BlockHash(letter.encode()) for letter in text]


def run_of(text: str, depth: int = 0) -> Run[int]:
    return Run(0, depth, keys(text), list(range(len(text))), None)


@pytest.mark.parametrize(
    ("path", "shared"), [("abcd", 4), ("abcdef", 4), ("abc", 3), ("abxy", 2), ("xbcd", 0), ("", 0)]
)
def test_shared_counts_the_keys_a_path_has_in_common(path: str, shared: int) -> None:
    assert run_of("abcd").shared(keys(path)) == shared


def test_shared_begins_at_the_depth_of_the_run() -> None:
    assert run_of("cd", depth=2).shared(keys("abcde")) == 2
    assert run_of("cd", depth=2).shared(keys("zzcx")) == 1


@given(st.text("ab", min_size=1, max_size=12), st.text("ab", max_size=12))
def test_shared_is_right_for_keys_that_are_not_chained(run: str, path: str) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(run, path, strict=False)) if a != b), min(len(run), len(path)))

    assert run_of(run).shared(keys(path)) == expected


def test_end_is_the_depth_of_what_comes_next() -> None:
    assert run_of("abc", depth=5).end == 8
