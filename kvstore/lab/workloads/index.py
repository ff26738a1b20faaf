"""The prefix index and the eviction policies per block of a prompt, over what a dict takes for the same blocks.

Prompts are of 500 blocks, of which the first 128 are one of a few system prompts. The index matches a prompt as a later
request hashes it (equal keys, other objects), and takes a new one in and prunes it from its end, as an evicting tier
does. A policy is told of a prompt that comes, is used, is pinned and unpinned, while as much leaves.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from itertools import count

from eviction.policy import Hint
from eviction.registry import POLICIES, make_policy
from kvstore.lab.bench import Case, Table, measure
from radix.namespace import BlockHash
from radix.tree import RadixTree

NUM_PROMPTS = 1_000  # that are there all the time
QUICK_PROMPTS = 200
NUM_SYSTEM_PROMPTS = 20
SYSTEM_BLOCKS = 128
OWN_BLOCKS = 372
TTL_S = 600.0
REUSED = Hint(hits=1)

Path = list[BlockHash]


def run(argument: str, quick: bool) -> list[Table]:
    """Measure a tree that is full of prompts, and every policy of ours in a steady state."""
    prompts = _Prompts()
    stored = [prompts.new() for _ in range(QUICK_PROMPTS if quick else NUM_PROMPTS)]
    return [_index(prompts, stored, quick), _policies(prompts, stored, quick)]


class _Prompts:
    """Prompts that were never seen, below system prompts that were."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._systems = [self._fresh(SYSTEM_BLOCKS) for _ in range(NUM_SYSTEM_PROMPTS)]

    def new(self) -> Path:
        return self._random.choice(self._systems) + self._fresh(OWN_BLOCKS)

    def _fresh(self, num_blocks: int) -> Path:
        return [BlockHash(self._random.randbytes(32)) for _ in range(num_blocks)]


def _index(prompts: _Prompts, stored: list[Path], quick: bool) -> Table:
    tree: RadixTree[int] = RadixTree()
    floor: dict[BlockHash, int] = {}
    length = SYSTEM_BLOCKS + OWN_BLOCKS
    for path in stored:
        tree.insert(path, range(length))
        floor.update(zip(path, range(length), strict=True))
    turns = count()
    asked: Path = []
    fresh: Path = []

    def ask() -> None:
        asked[:] = [BlockHash(bytes(bytearray(key))) for key in stored[next(turns) % len(stored)]]

    def meet() -> None:
        fresh[:] = prompts.new()

    def come_and_go() -> None:
        depth = len(tree.match(fresh))
        tree.extend(fresh, depth, range(depth, length))
        for key in fresh[: SYSTEM_BLOCKS - 1 : -1]:
            tree.prune(key)

    cases = [
        Case("dict: look up every block", lambda: [floor.get(key) for key in asked], length, ask),
        Case("match a prompt that is known", lambda: tree.match(asked), length, ask),
        Case("look up every block, one by one", lambda: [tree.get(key) for key in asked], length, ask),
        Case("match, extend, prune a prompt that is new", come_and_go, OWN_BLOCKS, meet),
    ]
    return measure(f"index of {len(tree):,} blocks", "blocks", cases, quick=quick)


def _policies(prompts: _Prompts, stored: list[Path], quick: bool) -> Table:
    tails = [path[: SYSTEM_BLOCKS - 1 : -1] for path in stored]  # tail first, as tiers tell them
    floor = OrderedDict.fromkeys((key for tail in tails for key in tail), 0.0)
    clock = count(1)
    fresh: Path = []

    def meet() -> None:
        fresh[:] = prompts.new()[: SYSTEM_BLOCKS - 1 : -1]

    def replace_in_dict() -> None:
        for key in fresh:
            floor[key] = 0.0
            floor.popitem(last=False)

    def steady(name: str, ttl_s: float | None) -> Callable[[], None]:
        policy = make_policy(name, ttl_s)
        for tail in tails:
            policy.add(tail, float(next(clock)))

        def turn() -> None:
            now = float(next(clock))
            policy.add(fresh, now)
            policy.touch(fresh, now)
            policy.discard(fresh)  # pinned
            policy.add(fresh, now, REUSED)
            policy.discard(policy.victims(len(fresh)))

        return turn

    cases = [Case("OrderedDict: one comes, the oldest leaves", replace_in_dict, OWN_BLOCKS, meet)]
    cases += [
        Case(f"{name}{' with TTL' if ttl_s else ''}", steady(name, ttl_s), OWN_BLOCKS, meet)
        for name in sorted(POLICIES)
        for ttl_s in (None, TTL_S)
    ]
    return measure(f"policies of {len(floor):,} blocks: add, touch, pin, unpin, evict", "blocks", cases, quick=quick)
