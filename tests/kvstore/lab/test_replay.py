"""Replays of made-up traces, beside what can be counted by hand and by a simulator that shares no line with ours."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.lab import compiled
from kvstore.lab.replay import play
from kvstore.lab.setup import DISK, HOST, Setup
from kvstore.lab.sweep import Player
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

BLOCK = 4


def trace_of(*prompts: tuple[int, ...], at_s: tuple[float, ...] = ()) -> ReplayTrace:
    times = at_s or tuple(map(float, range(len(prompts))))
    requests = (
        KvtRequest(now, -1, -1, BLOCK * len(blocks), 1, blocks) for now, blocks in zip(times, prompts, strict=True)
    )
    return ReplayTrace("made up", BLOCK, tuple(requests))


def hits_of(trace: ReplayTrace, *, capacity: float, disk: int = 0, **options: Any) -> dict[str, int]:
    """The hit tokens of a trace by tier; capacity: share of its blocks."""
    tiers = ((HOST, trace.blocks_of(capacity)), *([(DISK, disk)] if disk else []))
    setup = Setup(tiers, **options)
    tokens = Player(trace, engine="planner").hit_tokens(play(trace, setup)).sum(axis=0)
    return {name: int(num) for (name, _), num in zip(tiers, tokens, strict=True) if num}


def chat_traffic(seed: int, num_requests: int) -> list[tuple[int, ...]]:
    """Conversations that grow by turns, below a few shared system prompts."""
    rng = random.Random(seed)
    fresh = iter(range(1000, 1_000_000))
    systems = [tuple(next(fresh) for _ in range(4)) for _ in range(3)]
    chats: list[tuple[int, ...]] = []
    asked: list[tuple[int, ...]] = []
    for _ in range(num_requests):
        if chats and rng.random() < 0.7:
            number = rng.randrange(len(chats))
            chats[number] = (chats[number] + tuple(next(fresh) for _ in range(rng.randrange(1, 4))))[:30]
            asked.append(chats[number])
        else:
            chats.append((*rng.choice(systems), next(fresh)))
            asked.append(chats[-1])
    return asked


def lru_hits(prompts: list[tuple[int, ...]], capacity: int) -> int:
    """Blocks found by an LRU of blocks in which a prefix counts up to its first gap."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in prompts:
        found = next((i for i, block in enumerate(blocks) if block not in cache), len(blocks))
        hits += found
        for block in reversed(blocks):  # a tail looks older than its head
            cache.pop(block, None)
            cache[block] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def test_what_was_asked_before_is_a_hit_up_to_where_prompts_differ() -> None:
    assert hits_of(trace_of((1, 2, 3), (1, 2, 4), (1, 2, 3)), capacity=1.0) == {"host": BLOCK * (2 + 3)}


@pytest.mark.parametrize("capacity", [0.05, 0.2, 0.6])
def test_lru_hits_as_often_as_another_simulator_says(capacity: float) -> None:
    prompts = chat_traffic(3, 400)
    trace = trace_of(*prompts)

    hits = hits_of(trace, capacity=capacity)

    assert 0 < hits["host"] < trace.prompt_tokens
    assert hits["host"] == BLOCK * lru_hits(prompts, trace.blocks_of(capacity))


def test_policies_differ_where_there_is_no_room_for_all() -> None:
    trace = trace_of(*chat_traffic(5, 400))

    hits = {policy: hits_of(trace, capacity=0.1, policy=policy)["host"] for policy in ("lru", "sieve", "s3fifo")}

    assert len(set(hits.values())) > 1
    assert hits_of(trace, capacity=1.0) == hits_of(trace, capacity=1.0, policy="sieve")


def test_a_page_lives_by_the_traces_own_times() -> None:
    trace = trace_of((1, 2), (1, 2), (1, 2), at_s=(0.0, 50.0, 200.0))

    assert hits_of(trace, capacity=1.0, ttl_s=100.0) == {"host": 2 * BLOCK}
    assert hits_of(trace, capacity=1.0) == {"host": 4 * BLOCK}


def test_what_host_memory_has_no_room_for_is_a_hit_of_the_tier_below() -> None:
    trace = trace_of((1, 2, 3), (4, 5, 6), (1, 2, 3))

    assert hits_of(trace, capacity=0.5, disk=100) == {"disk": 3 * BLOCK}
    assert play(trace, Setup(((HOST, 3), (DISK, 100)))).written == (9, 6)


def test_the_last_block_counts_with_the_tokens_that_are_in_it() -> None:
    request = KvtRequest(0.0, -1, -1, 2 * BLOCK + 1, 1, (1, 2, 3))

    assert hits_of(ReplayTrace("tail", BLOCK, (request, request)), capacity=1.0) == {"host": 2 * BLOCK + 1}


@pytest.mark.parametrize("routing", ["round_robin", "prefix"])
@pytest.mark.parametrize("is_pooled", [False, True])
@pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")
def test_replicas_hit_what_the_compiled_engine_hits(routing: str, is_pooled: bool) -> None:
    trace = trace_of(*chat_traffic(7, 400))
    setup = Setup(((HOST, 60), (DISK, 120)), replicas=3, routing=routing, is_pooled=is_pooled)

    planned, swept = play(trace, setup), compiled.play(compiled.TraceArrays.of(trace), setup)

    assert planned.hit_blocks.tolist() == swept.hit_blocks.tolist()
    assert planned.written == swept.written


def test_private_caches_hit_less_than_pooled_ones_where_requests_go_in_turn() -> None:
    trace = trace_of(*chat_traffic(7, 400))

    private = hits_of(trace, capacity=0.2, replicas=3, routing="round_robin")["host"]

    assert private < hits_of(trace, capacity=0.2, replicas=3, routing="round_robin", is_pooled=True)["host"]


def test_an_exclusive_disk_holds_what_leaves_host_memory() -> None:
    trace = trace_of(*chat_traffic(7, 400))

    inclusive = play(trace, Setup(((HOST, 100), (DISK, 200))))
    exclusive = play(trace, Setup(((HOST, 100), (DISK, 200)), is_exclusive=True))

    assert exclusive.hit_blocks.sum() > inclusive.hit_blocks.sum()


def test_a_budget_bounds_what_the_planner_writes_to_disk() -> None:
    trace = trace_of(*chat_traffic(7, 400), at_s=tuple(30.0 * number for number in range(400)))
    a_day, an_hour_and_the_trace = 1000, (3600 + 400 * 30) / 86_400

    written = play(trace, Setup(((HOST, 100), (DISK, 2000)), writes_per_day=a_day)).written[1]

    assert 0.8 * a_day * an_hour_and_the_trace < written < a_day * an_hour_and_the_trace + 8  # a batch of debt
    assert written < play(trace, Setup(((HOST, 100), (DISK, 2000)))).written[1]


def test_a_disk_admits_by_forecast_where_the_policy_has_one() -> None:
    trace = trace_of(*chat_traffic(7, 200))

    always = hits_of(trace, capacity=0.1, disk=20, policy="outlook")
    predicted = hits_of(trace, capacity=0.1, disk=20, policy="outlook", admit="predicted")

    assert predicted["disk"] > 0
    assert predicted != always
    with pytest.raises(ConfigError, match="policy 'lru' forecasts nothing; it must be one that does: outlook"):
        hits_of(trace, capacity=0.1, disk=20, admit="predicted")


def test_an_engine_that_is_none_is_told_with_the_list() -> None:
    with pytest.raises(ConfigError, match="one of auto, planner, compiled"):
        Player(trace_of((1, 2)), engine="fast")
