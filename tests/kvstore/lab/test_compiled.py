"""The compiled engine hits what the planner hits, request by request, and what the optimum's lines of Python say."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvstore.lab import compiled, replay
from kvstore.lab.compiled import TraceArrays
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.setup import DISK, HOST, REDIS, Setup
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

pytestmark = pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")

BLOCK = 4


def forest_traffic(seed: int, num_requests: int = 400, width: int = 3, depth: int = 12) -> ReplayTrace:
    """Prompts along the paths of a few trees, the recent ones more likely; seconds apart, some at the same time."""
    rng, said = random.Random(seed), random.Random(seed)  # what replies say changes no prompt
    ids: dict[tuple[int, ...], int] = {}
    prompts: list[tuple[int, ...]] = []
    requests: list[KvtRequest] = []
    now = 0.0
    for _ in range(num_requests):
        if prompts and rng.random() < 0.5:  # a turn of a conversation
            path = rng.choice(prompts[-20:]) + tuple(rng.randrange(99) for _ in range(rng.randrange(4)))
        else:
            path = tuple(rng.randrange(width) for _ in range(rng.randrange(1, depth + 1)))
        prompts.append(path[: 2 * depth])
        blocks = tuple(ids.setdefault(prompts[-1][: i + 1], len(ids)) for i in range(len(prompts[-1])))
        now += rng.choice((0.0, 0.5, 1.0, 7.0))
        tokens, reply = BLOCK * len(blocks) - rng.randrange(BLOCK), said.choice((-1, 1, 100, 500))
        reason = said.choice(("", "stop", "tool_calls"))
        requests.append(KvtRequest(now, -1, -1, tokens, reply, blocks, finish_reason=reason))
    return ReplayTrace("made up", BLOCK, tuple(requests))


def planned(trace: ReplayTrace, setup: Setup) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the hit blocks of each request by tier, and the blocks written to lower tiers, as the planner has them."""
    played = replay.play(trace, setup)
    return played.hit_blocks, list(played.written[1:])


@pytest.mark.parametrize("policy", ["lru", "outlook", "s3fifo", "sieve"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ttl_s", [None, 30.0])
@pytest.mark.parametrize("num_blocks", [3, 20, 60, 10_000])
def test_host_memory_hits_what_the_planner_hits(policy: str, seed: int, ttl_s: float | None, num_blocks: int) -> None:
    trace = forest_traffic(seed)
    setup = Setup(((HOST, num_blocks),), policy, ttl_s)

    played = compiled.play(TraceArrays.of(trace), setup)

    assert played.hit_blocks.sum() > 0
    assert played.hit_blocks.tolist() == planned(trace, setup)[0].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_the_few_lines(seed: int) -> None:
    trace = forest_traffic(seed)
    arrays = TraceArrays.of(trace)

    for num_blocks in (1, 3, 20, 60, 300, 10_000):
        played = compiled.optimum(arrays, num_blocks)
        assert played.hit_tokens(arrays.prompt_tokens, BLOCK).sum() == optimal_hit_tokens(trace, num_blocks)


@pytest.mark.parametrize("admit", ["always", "second_use"])
@pytest.mark.parametrize("ttl_s", [None, 30.0])
@pytest.mark.parametrize("sizes", [(10, 60), (40, 200), (60, 10_000), (10, 40, 160)])
def test_inclusive_tiers_hit_what_the_planner_hits(admit: str, ttl_s: float | None, sizes: tuple[int, ...]) -> None:
    trace = forest_traffic(8, depth=8)
    setup = Setup(tuple(zip((HOST, DISK, REDIS), sizes, strict=False)), "lru", ttl_s, admit=admit)

    played = compiled.play(TraceArrays.of(trace), setup)

    expected, written = planned(trace, setup)
    assert (played.hit_blocks.sum(axis=0)[:2] > 0).all()
    assert played.hit_blocks[:, 0].tolist() == expected[:, 0].tolist()
    # Of two tiers below that both have a block the planner takes the one that was measured faster, here the nearer; and
    # what it brings from the last to a small disk may push out the path's own head there, which is written once more.
    assert list(played.written[1:]) == written or len(sizes) == 3
    assert played.hit_blocks.sum(axis=1).tolist() == expected.sum(axis=1).tolist()


def test_a_policy_that_learns_from_requests_is_left_to_the_planner_where_there_are_tiers() -> None:
    assert compiled.can_play(Setup(((HOST, 10),), "outlook"))
    assert not compiled.can_play(Setup(((HOST, 10), (DISK, 60)), "outlook"))
