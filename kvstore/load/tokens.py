"""Token ids for a trace's prompts: those of a block depend on its id and the seed only.

So what the trace says is shared is shared, token by token, in every run and process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESERVED_IDS = 1000  # the first ids of most vocabularies are control tokens and bytes

_FIRST_TAIL = 1 << 40  # tails have numbers of their own, far above any block's
_Numbers = np.ndarray[Any, np.dtype[np.uint64]]


def make_ids(
    blocks: Sequence[int], num_tokens: int, tail: int, block_tokens: int, vocab_size: int, seed: int
) -> list[int]:
    """The ids of a prompt of these blocks, each below `vocab_size`; the tail beyond the blocks is like no other's."""
    num_rest = max(0, num_tokens - len(blocks) * block_tokens)
    sources = np.concatenate(
        [
            np.repeat(np.array(blocks, np.uint64), block_tokens),
            np.full(num_rest, _FIRST_TAIL + tail, np.uint64),
        ]
    )[:num_tokens]
    places = np.concatenate(
        [np.tile(np.arange(block_tokens, dtype=np.uint64), len(blocks)), np.arange(num_rest, dtype=np.uint64)]
    )[:num_tokens]
    mixed = _mix(_mix(sources + np.uint64(seed)) + places)
    low = min(RESERVED_IDS, vocab_size // 4)
    ids: list[int] = (mixed % np.uint64(vocab_size - low) + np.uint64(low)).tolist()
    return ids


def _mix(numbers: _Numbers) -> _Numbers:
    # splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014); wraps at 64 bits. Not
    # numpy's generators: a whole prompt at once, and the same numbers in every version.
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Numbers = numbers ^ (numbers >> np.uint64(31))
    return mixed
