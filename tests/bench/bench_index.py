"""What the prefix index and an eviction policy cost per 16-token block: CPU nanoseconds, medians.

    python tests/bench/bench_index.py --json out.json

Workload "shared": 2,000 prompts of 500 blocks, of which 20 system prompts share the first 128 (750,000 blocks in all).
Each prompt is matched, extended, matched again as a later request would (equal keys, other objects), asked for block by
block, and at last pruned from its end as an evicting tier does. Workload "long": one prompt of 8,192 blocks (128K
tokens).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs from a checkout that is not installed

from eviction.policy import Hint
from eviction.registry import POLICIES, make_policy
from kvstore.lab.machine import machine, versions
from radix.namespace import BlockHash
from radix.tree import RadixTree

NUM_PROMPTS = 2_000
NUM_SYSTEM_PROMPTS = 20
SYSTEM_BLOCKS = 128
OWN_BLOCKS = 372
LONG_BLOCKS = 8_192
REUSED = Hint(hits=1)


class Meter:
    """Nanoseconds of CPU per block, a sample for each call."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def measure(self, name: str, num_blocks: int, work: Callable[..., Any], *args: Any) -> Any:
        began = time.thread_time()
        answer = work(*args)
        self.samples.setdefault(name, []).append((time.thread_time() - began) * 1e9 / max(num_blocks, 1))
        return answer

    def medians(self) -> dict[str, float]:
        return {name: round(median(samples), 1) for name, samples in self.samples.items()}

    def means(self) -> dict[str, float]:
        """Unlike a median, a mean has the growth of dicts and lists in it."""
        return {name: round(sum(samples) / len(samples), 1) for name, samples in self.samples.items()}


def prompts(num: int) -> list[list[BlockHash]]:
    rng = random.Random(0)
    systems = [[BlockHash(rng.randbytes(32)) for _ in range(SYSTEM_BLOCKS)] for _ in range(NUM_SYSTEM_PROMPTS)]
    return [systems[i % len(systems)] + [BlockHash(rng.randbytes(32)) for _ in range(OWN_BLOCKS)] for i in range(num)]


def copied(path: list[BlockHash]) -> list[BlockHash]:
    """Equal keys in other objects, as a later request hashes them."""
    return [BlockHash(bytes(bytearray(key))) for key in path]


def each(ask: Callable[[BlockHash], Any], keys: list[BlockHash]) -> None:
    """Ask about one key after the other, as callers do."""
    for key in keys:
        ask(key)


def shared_prompts(num: int) -> dict[str, Any]:
    """Many prompts in one tree."""
    paths = prompts(num)
    tree: RadixTree[object] = RadixTree()
    values = [object()] * (SYSTEM_BLOCKS + OWN_BLOCKS)
    meter = Meter()
    gc.collect()
    for path in paths:
        depth = len(meter.measure("match_first", len(path), tree.match, path))
        meter.measure("extend", len(path) - depth, tree.extend, path, depth, values[depth:])
    for path in paths[::4]:
        meter.measure("match_again", len(path), tree.match, copied(path))
        meter.measure("get", len(path), each, tree.get, path)
    blocks, runs = len(tree), sum(1 for _ in tree.runs())
    for path in paths:
        own = path[:SYSTEM_BLOCKS:-1]
        meter.measure("prune", len(own), each, tree.prune, own)
    means = meter.means()
    return {
        "blocks": blocks,
        "runs": runs,
        "ns_per_block": meter.medians(),
        "mean_ns_per_block": means,
        "match_extend_prune_us": round((means["match_again"] + means["extend"] + means["prune"]) / 1e3, 3),
    }


def long_prompt(rounds: int) -> dict[str, Any]:
    """One prompt of 128K tokens: microseconds for the whole of it."""
    rng = random.Random(1)
    path = [BlockHash(rng.randbytes(32)) for _ in range(LONG_BLOCKS)]
    half = LONG_BLOCKS // 2
    branch = copied(path[:half]) + [BlockHash(key[::-1]) for key in path[half:]]
    again = copied(path)
    meter = Meter()
    for _ in range(rounds):
        tree: RadixTree[int] = RadixTree()
        meter.measure("insert", 1, tree.insert, path, range(LONG_BLOCKS))
        meter.measure("match", 1, tree.match, again)
        meter.measure("match_half", 1, tree.match, branch)
        meter.measure("branch_in_the_middle", 1, tree.extend, branch, half, range(half))
        meter.measure("remove", 1, tree.remove, path[0])
    return {"blocks": LONG_BLOCKS, "us": {name: round(ns / 1e3, 1) for name, ns in meter.medians().items()}}


def policy_cost(name: str, ttl_s: float | None, num: int) -> dict[str, float]:
    """A tier in steady state: a prompt comes in, is used, is pinned and unpinned, and as much leaves."""
    policy = make_policy(name, ttl_s)
    meter = Meter()
    size = SYSTEM_BLOCKS + OWN_BLOCKS
    gc.collect()
    for number, path in enumerate(prompts(num)):
        tail_first, now = path[:SYSTEM_BLOCKS:-1], float(number)
        num_blocks = len(tail_first)
        meter.measure("add", num_blocks, policy.add, tail_first, now)
        meter.measure("touch", num_blocks, policy.touch, tail_first, now)
        meter.measure("pin", num_blocks, policy.discard, tail_first)
        meter.measure("unpin", num_blocks, policy.add, tail_first, now, REUSED)
        if len(policy) > num * size // 4:
            victims = meter.measure("victims", num_blocks, policy.victims, num_blocks)
            meter.measure("evict", num_blocks, policy.discard, victims)
    return meter.medians()


def run(num_prompts: int = NUM_PROMPTS) -> dict[str, Any]:
    """Measure the index and every policy."""
    return {
        "workload": {
            "prompts": num_prompts,
            "system_prompts": NUM_SYSTEM_PROMPTS,
            "system_blocks": SYSTEM_BLOCKS,
            "own_blocks": OWN_BLOCKS,
        },
        "shared": shared_prompts(num_prompts),
        "long": long_prompt(11),
        "policies_ns_per_block": {
            f"{name}{'+ttl' if ttl_s else ''}": policy_cost(name, ttl_s, num_prompts // 4)
            for name in sorted(POLICIES)
            for ttl_s in (None, 600.0)
        },
        "machine": machine(),
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    args = parser.parse_args()
    result = run(args.prompts)
    for part in ("shared", "long", "policies_ns_per_block"):
        print(part, json.dumps(result[part], indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
