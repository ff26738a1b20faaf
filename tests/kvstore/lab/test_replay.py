"""Replays of made-up traces, beside what can be counted by hand and by a simulator that shares no line with ours."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from typing import Any

import pytest

from eviction.registry import make_policy
from kvstore.lab.replay import ReplayReport
from kvstore.lab.replay import replay as replay_blocks
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest
from kvstore.plan.tier_plan import TierPlan

BLOCK = 4


def trace_of(*prompts: tuple[int, ...], at_s: tuple[float, ...] = ()) -> ReplayTrace:
    times = at_s or tuple(map(float, range(len(prompts))))
    requests = (
        KvtRequest(now, -1, -1, BLOCK * len(blocks), 1, blocks) for now, blocks in zip(times, prompts, strict=True)
    )
    return ReplayTrace("made up", BLOCK, tuple(requests))


def replay(trace: ReplayTrace, *, capacity: float, **options: Any) -> ReplayReport:
    return replay_blocks(trace, trace.blocks_of(capacity), **options)


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
    report = replay(trace_of((1, 2, 3), (1, 2, 4), (1, 2, 3)), capacity=1.0)

    assert report.hit_tokens == {"host": BLOCK * (2 + 3)}
    assert (report.num_requests, report.num_blocks, report.prompt_tokens) == (3, 9, 9 * BLOCK)
    assert report.hit_rate == 5 / 9


@pytest.mark.parametrize("capacity", [0.05, 0.2, 0.6])
def test_lru_hits_as_often_as_another_simulator_says(capacity: float) -> None:
    prompts = chat_traffic(3, 400)
    trace = trace_of(*prompts)

    report = replay(trace, capacity=capacity)

    assert 0 < report.hit_rate < 1
    assert report.hit_tokens["host"] == BLOCK * lru_hits(prompts, trace.blocks_of(capacity))


def test_policies_differ_where_there_is_no_room_for_all() -> None:
    trace = trace_of(*chat_traffic(5, 400))

    rates = {policy: replay(trace, capacity=0.1, policy=policy).hit_rate for policy in ("lru", "sieve", "s3fifo")}

    assert len(set(rates.values())) > 1
    assert replay(trace, capacity=1.0).hit_rate == replay(trace, capacity=1.0, policy="sieve").hit_rate


def test_a_page_lives_by_the_traces_own_times() -> None:
    trace = trace_of((1, 2), (1, 2), (1, 2), at_s=(0.0, 50.0, 200.0))

    assert replay(trace, capacity=1.0, ttl_s=100.0).hit_tokens == {"host": 2 * BLOCK}
    assert replay(trace, capacity=1.0).hit_tokens == {"host": 4 * BLOCK}


def test_what_host_memory_has_no_room_for_is_a_hit_of_the_tier_below() -> None:
    disk = TierPlan("disk", 100, make_policy("lru"), is_indexed=True, is_shared=False)

    report = replay(trace_of((1, 2, 3), (4, 5, 6), (1, 2, 3)), capacity=0.5, tiers=[disk])

    assert report.hit_tokens == {"disk": 3 * BLOCK}


def test_the_last_block_counts_with_the_tokens_that_are_in_it() -> None:
    request = KvtRequest(0.0, -1, -1, 2 * BLOCK + 1, 1, (1, 2, 3))

    report = replay(ReplayTrace("tail", BLOCK, (request, request)), capacity=1.0)

    assert report.hit_tokens == {"host": 2 * BLOCK + 1}
    assert report.hit_rate == 0.5


def test_a_report_is_plain_data() -> None:
    record = json.loads(json.dumps(replay(trace_of((1, 2), (1, 2)), capacity=1.0).as_record()))

    assert (record["trace"], record["policy"], record["num_slots"], record["hit_rate"]) == ("made up", "lru", 2, 0.5)
    assert record["us_per_block"] >= 0
