"""Hash a prompt of 128K tokens into block hashes: CPU ms, and the ratio to hashing the same bytes in one go.

    python tests/bench/bench_hashing.py --json out.json

The ways take turns round after round, so that all see the same machine; reported are medians of CPU time of the thread.
A ratio of 1 would mean that cutting a prompt into chained blocks costs nothing; SHA-256 cannot pass 0.5, because a
block of 64 bytes with the key before it and the padding is two compressions where raw hashing has one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs from a checkout that is not installed

import numpy as np
import xxhash

from kvstore.lab.machine import machine, versions
from radix import hashing
from radix.hashing import BlockHasher, Namespace, as_tokens, bind_hashes, hash_blocks

NUM_TOKENS = 128 * 1024
BLOCK_SIZE = 16
ROUNDS = 21


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure every way to hash; `ms` are CPU milliseconds for the whole prompt."""
    tokens = np.random.default_rng(0).integers(0, 128_000, NUM_TOKENS, dtype=np.uint32)
    token_list, wide_tokens = tokens.tolist(), tokens.astype(np.int64)
    root = Namespace("bench", "", "bfloat16", "", BLOCK_SIZE).root()
    block_bytes = 4 * BLOCK_SIZE
    keys = hash_blocks(tokens, BLOCK_SIZE, root=root)

    def in_turns() -> None:
        hasher = BlockHasher(root, BLOCK_SIZE)
        for start in range(0, NUM_TOKENS, 500):  # a conversation that grows by 500 tokens a turn
            hasher.extend(tokens[start : start + 500])

    ways: dict[str, Callable[[], object]] = {
        "raw_sha256": lambda: hashlib.sha256(tokens.data).digest(),
        "raw_xxh3_128": lambda: xxhash.xxh3_128_digest(tokens.data),
        "sha256": lambda: hash_blocks(tokens, BLOCK_SIZE, root=root),
        "sha256_twin": lambda: hashing.chain_twin(root, tokens.data.cast("B"), block_bytes),
        "sha256_in_turns": in_turns,
        "xxh3_128": lambda: hash_blocks(tokens, BLOCK_SIZE, root=root, algorithm="xxh3_128"),
        "bind": lambda: bind_hashes(root, keys),
        "list_to_tokens": lambda: as_tokens(token_list),
        "int64_to_tokens": lambda: as_tokens(wide_tokens),
    }
    chain = hashing._chain
    if chain is not None:
        ways["sha256_portable"] = lambda: chain.chain_sha256(root, tokens, block_bytes, portable=True)
    ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            ms[name].append((time.thread_time() - began) * 1e3)
    medians = {name: median(taken) for name, taken in ms.items()}
    return {
        "workload": {"num_tokens": NUM_TOKENS, "block_size": BLOCK_SIZE, "num_blocks": len(keys), "rounds": rounds},
        "extension": chain is not None,
        "sha_instructions": chain is not None and chain.accelerated(),
        "ms": {name: round(value, 4) for name, value in medians.items()},
        "ns_per_block": {name: round(value * 1e6 / len(keys), 1) for name, value in medians.items()},
        "speed_over_raw": {
            name: round(medians["raw_xxh3_128" if "xxh3" in name else "raw_sha256"] / value, 3)
            for name, value in medians.items()
            if "sha256" in name or "xxh3" in name
        },
        "machine": machine(),
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    result = run(args.rounds)
    for name, value in result["ms"].items():
        ratio = result["speed_over_raw"].get(name)
        print(f"{name:18} {value:8.3f} ms" + (f"   {ratio:6.3f}x of raw" if ratio is not None else ""))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
