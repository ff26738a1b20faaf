"""Where two prompts part: in characters and tokens, the pages that are lost, and a window to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.prefix.tokens import Ids, Tokenizer

WINDOW_BEFORE, WINDOW_AFTER = 60, 60  # characters


@dataclass(frozen=True, slots=True)
class Window:
    """The text around a difference. shared: the end of what both have; old, new: how they go on."""

    shared: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class PrefixDifference:
    """How much of an old prompt the new one begins with.

    at_char:    characters that both have. old_tokens, new_tokens: of the prompts. common_tokens: those that both have.
    lost_pages: by block size: whole blocks of the old prompt that the new one cannot use.
    """

    at_char: int
    old_tokens: int
    new_tokens: int
    common_tokens: int
    lost_pages: dict[int, int]
    window: Window

    @property
    def lost_tokens(self) -> int:
        """Tokens of the old prompt that the new one does not begin with."""
        return self.old_tokens - self.common_tokens

    @property
    def kept_share(self) -> float:
        """Share of the old prompt that the new one begins with."""
        return self.common_tokens / self.old_tokens if self.old_tokens else 1.0


def compare(old: str, new: str, tokenizer: Tokenizer, block_sizes: Sequence[int]) -> PrefixDifference:
    """Compare two rendered prompts."""
    return compare_ids(old, new, tokenizer.encode(old), tokenizer.encode(new), block_sizes)


def compare_ids(old: str, new: str, old_ids: Ids, new_ids: Ids, block_sizes: Sequence[int]) -> PrefixDifference:
    """Compare two prompts whose tokens are known; the texts are for the window."""
    common = common_ids(old_ids, new_ids)
    at = common_chars(old, new)
    return PrefixDifference(
        at_char=at,
        old_tokens=len(old_ids),
        new_tokens=len(new_ids),
        common_tokens=common,
        lost_pages={size: len(old_ids) // size - common // size for size in block_sizes},
        window=Window(old[max(0, at - WINDOW_BEFORE) : at], old[at : at + WINDOW_AFTER], new[at : at + WINDOW_AFTER]),
    )


def common_ids(old: Ids, new: Ids) -> int:
    """Return how many ids both begin with."""
    length = min(len(old), len(new))
    differs = np.flatnonzero(old[:length] != new[:length])
    return int(differs[0]) if len(differs) else length


def common_chars(old: str, new: str) -> int:
    """Return how many characters both begin with."""
    # Halved until it fits: comparing slices is far quicker than characters one by one.
    low, high = 0, min(len(old), len(new))
    while low < high:
        middle = (low + high + 1) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
