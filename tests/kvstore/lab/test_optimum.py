"""The offline optimum: counted by hand, never beaten, and reached where a search tries everything."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import pytest

from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.replay import play
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.sweep import Player
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

BLOCK = 4


def trace_of(*prompts: tuple[int, ...]) -> ReplayTrace:
    requests = (KvtRequest(float(n), -1, -1, BLOCK * len(blocks), 1, blocks) for n, blocks in enumerate(prompts))
    return ReplayTrace("made up", BLOCK, tuple(requests))


def tree_traffic(seed: int, num_requests: int, width: int, depth: int) -> list[tuple[int, ...]]:
    """Prompts along the paths of a tree, so that prefixes are shared."""
    rng = random.Random(seed)
    ids: dict[tuple[int, ...], int] = {}
    prompts = []
    for _ in range(num_requests):
        path = tuple(rng.randrange(width) for _ in range(rng.randrange(1, depth + 1)))
        prompts.append(tuple(ids.setdefault(path[: i + 1], len(ids)) for i in range(len(path))))
    return prompts


def best_of_all(prompts: list[tuple[int, ...]], num_slots: int) -> int:
    """The most blocks that are hit, over every choice of what to keep after each request."""

    @cache
    def best(number: int, kept: frozenset[int]) -> int:
        if number == len(prompts):
            return 0
        blocks = prompts[number]
        hits = next((i for i, block in enumerate(blocks) if block not in kept), len(blocks))
        there = kept | set(blocks)
        choices = combinations(sorted(there), min(num_slots, len(there)))
        return hits + max(best(number + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


def test_what_is_used_again_last_leaves_first() -> None:
    trace = trace_of((1, 2), (3, 4), (1, 2), (3, 4))

    assert optimal_hit_tokens(trace, 4) == BLOCK * 4
    assert optimal_hit_tokens(trace, 2) == BLOCK * 2
    assert optimal_hit_tokens(trace, 1) == BLOCK * 1


def test_the_last_block_counts_with_the_tokens_that_are_in_it() -> None:
    request = KvtRequest(0.0, -1, -1, 2 * BLOCK + 1, 1, (1, 2, 3))

    assert optimal_hit_tokens(ReplayTrace("tail", BLOCK, (request, request)), 3) == 2 * BLOCK + 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_no_choice_of_what_to_keep_hits_more(seed: int, num_slots: int) -> None:
    prompts = tree_traffic(seed, num_requests=6, width=2, depth=3)

    assert optimal_hit_tokens(trace_of(*prompts), num_slots) == BLOCK * best_of_all(prompts, num_slots)


@pytest.mark.parametrize("policy", ["lru", "sieve", "s3fifo"])
def test_no_policy_beats_it(policy: str) -> None:
    trace = trace_of(*tree_traffic(3, num_requests=300, width=4, depth=6))

    for num_slots in (1, 8, 40, 200, trace.num_distinct):
        played = play(trace, Setup(((HOST, num_slots),), policy))
        hits = int(Player(trace).hit_tokens(played).sum())
        assert hits <= optimal_hit_tokens(trace, num_slots)
    assert hits == optimal_hit_tokens(trace, trace.num_distinct)


def test_the_heap_of_what_was_used_is_cleared_of_old_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trace_of(*tree_traffic(5, num_requests=300, width=3, depth=5))
    expected = [optimal_hit_tokens(trace, num_slots) for num_slots in (3, 30)]

    monkeypatch.setattr("kvstore.lab.optimum.SPARE", 0)

    assert [optimal_hit_tokens(trace, num_slots) for num_slots in (3, 30)] == expected
