"""Hash a prompt of 128K tokens. The ceiling is one SHA-256 over the same bytes, without a chain and without keys."""

from __future__ import annotations

import hashlib

import numpy as np

from kvstore.lab.bench import Case, Table, measure
from radix.hashing import BlockHash, BlockHasher, as_tokens, chain_twin, hash_blocks

NUM_TOKENS = 128 * 1024


def run(argument: str, quick: bool) -> list[Table]:
    """Measure whole prompts, for the usual block sizes, and a prompt that grows turn by turn."""
    tokens = np.random.default_rng(0).integers(0, 128_000, NUM_TOKENS, dtype=np.uint32)
    raw, as_list = tokens.tobytes(), tokens.tolist()
    root = BlockHash(bytes(32))

    def grow() -> None:
        hasher = BlockHasher(root, 64)
        for start in range(0, NUM_TOKENS, 1000):
            hasher.extend(tokens[start : start + 1000])

    cases = [
        Case("one SHA-256 over all tokens", lambda: hashlib.sha256(raw).digest(), NUM_TOKENS),
        Case("sha256, blocks of 16", lambda: hash_blocks(tokens, 16, root=root), NUM_TOKENS),
        Case("sha256, blocks of 64", lambda: hash_blocks(tokens, 64, root=root), NUM_TOKENS),
        Case("sha256, blocks of 64, 1000 tokens at a time", grow, NUM_TOKENS),
        Case("xxh3_128, blocks of 16", lambda: hash_blocks(tokens, 16, root=root, algorithm="xxh3_128"), NUM_TOKENS),
        Case("sha256, blocks of 16, without the extension", lambda: chain_twin(root, memoryview(raw), 64), NUM_TOKENS),
        Case("from a list of int to tokens", lambda: as_tokens(as_list), NUM_TOKENS),
    ]
    return [measure("128K tokens", "tokens", cases, quick=quick)]
