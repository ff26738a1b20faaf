from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.plan.resume import longest_resume, needed_from


def bits(text: str) -> list[int]:
    return [int(c == "x") for c in text]


@pytest.mark.parametrize(
    ("full", "sliding", "window", "expected"),
    [
        ("xxxxxxx.", "..xx.xx.", 2, 7),
        ("xxxxx...", "..xx.xx.", 2, 4),
        ("xxxxxxxx", "........", 2, 0),
        ("xxxxxxxx", "x.......", 2, 1),  # a resume after one block needs one block of the window
        ("xxxxxxxx", "........", 0, 8),  # a window of one token looks at nothing before it
        ("........", "xxxxxxxx", 2, 0),
    ],
)
def test_a_sliding_group_needs_only_its_window(full: str, sliding: str, window: int, expected: int) -> None:
    assert longest_resume([bits(full), bits(sliding)], [None, window], 8) == expected


def test_the_limit_is_kept() -> None:
    assert longest_resume([bits("xxxx")], [None], 2) == 2


@given(
    st.lists(st.lists(st.booleans(), max_size=8), min_size=1, max_size=3),
    st.lists(st.none() | st.integers(0, 4), min_size=3, max_size=3),
    st.integers(0, 8),
)
def test_it_is_the_largest_point_that_satisfies_the_rule(
    present: list[list[bool]], windows: list[int | None], limit: int
) -> None:
    windows = windows[: len(present)]

    def resumable(n: int) -> bool:
        return all(
            block < len(flags) and flags[block]
            for flags, window in zip(present, windows, strict=True)
            for block in range(needed_from(n, window), n)
        )

    # 0 is always a resume point, so max() has something to choose from.
    assert longest_resume(present, windows, limit) == max(n for n in range(limit + 1) if resumable(n))
