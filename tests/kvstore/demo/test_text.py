from __future__ import annotations

from itertools import takewhile

import pytest

from kvstore.demo.text import CHAPTERS, INSTRUCTION, forked_handbook, handbook


def count(text: str) -> int:
    """A token per word: as good as any for lengths."""
    return len(text.split())


@pytest.mark.parametrize("num_tokens", [50, 900, 3000])
def test_a_handbook_is_as_long_as_was_asked_to_the_next_paragraph(num_tokens: int) -> None:
    text = handbook(num_tokens, count)

    longest = max(count(chapter) for chapter in CHAPTERS)
    assert num_tokens <= count(text) <= num_tokens + longest + count(INSTRUCTION)
    assert text.endswith(INSTRUCTION)


@pytest.mark.parametrize("num_tokens", [300, 900, 3000])
def test_a_fork_shares_the_first_half_and_goes_on_differently(num_tokens: int) -> None:
    whole, fork = handbook(num_tokens, count), forked_handbook(num_tokens, count)

    pairs = zip(whole.split(), fork.split(), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert 0.5 <= shared / num_tokens < 0.5 + 100 / num_tokens
    assert count(fork) == pytest.approx(count(whole), rel=0.3)


def test_no_two_paragraphs_are_equal() -> None:
    paragraphs = handbook(5000, count).split("\n\n")

    assert len(set(paragraphs)) == len(paragraphs) > 60
