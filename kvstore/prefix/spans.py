"""Spans that prompts repeat elsewhere than at their beginning: tokens that no prefix cache can reach.

A prompt is cut where its own tokens say so, hence a passage is cut in the same places wherever it stands. Pieces seen
before that lie behind the prompt's longest known prefix are counted. They are counted only: the KV of a passage depends
on all that precedes it, so using it again would not be exact.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from kvstore.prefix.tokens import Ids

BLOCK = 16  # tokens; how finely a known prefix is followed
MEAN_PIECE = 32
MIN_PIECE = 16  # a shorter one is a phrase
MAX_KNOWN = 400_000  # hashes of each kind, oldest out first: about 40 MB


@dataclass(frozen=True, slots=True)
class Repeats:
    """Tokens of one prompt. prefix: of its beginning that a prompt before it had. elsewhere: repeated behind that."""

    prefix: int
    elsewhere: int


class Spans:
    """The prompts seen so far, as hashes. One thread."""

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._pieces: OrderedDict[bytes, None] = OrderedDict()

    def observe(self, ids: Ids) -> Repeats:
        """Count what a prompt repeats, and remember it. O(tokens)."""
        data = np.ascontiguousarray(ids, np.int64)
        prefix, known = 0, True
        above = b""
        for start in range(0, len(data) - BLOCK + 1, BLOCK):
            above = hashlib.blake2b(above + data[start : start + BLOCK].tobytes(), digest_size=12).digest()
            known = known and above in self._blocks
            prefix += BLOCK if known else 0
            self._remember(self._blocks, above)
        elsewhere, start = 0, 0
        for end in _ends(data):
            if end - start >= MIN_PIECE:
                piece = hashlib.blake2b(data[start:end].tobytes(), digest_size=12).digest()
                if piece in self._pieces:
                    elsewhere += max(0, end - max(start, prefix))
                self._remember(self._pieces, piece)
            start = end
        return Repeats(prefix, elsewhere)

    def _remember(self, known: OrderedDict[bytes, None], name: bytes) -> None:
        known[name] = None
        known.move_to_end(name)
        if len(known) > self._max_known:
            known.popitem(last=False)


def _ends(data: Ids) -> list[int]:
    """Return the ends of a prompt's pieces: behind four tokens whose mixed value is a multiple of MEAN_PIECE."""
    if len(data) < 4:
        return [len(data)]
    mixed = data[3:].astype(np.uint64)
    with np.errstate(over="ignore"):
        for back in (1, 2, 3):
            mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) ^ data[3 - back : len(data) - back].astype(np.uint64)
        mixed = (mixed * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(40)
    ends = (np.flatnonzero(mixed % np.uint64(MEAN_PIECE) == 0) + 4).tolist()
    return ends if ends and ends[-1] == len(data) else [*ends, len(data)]
