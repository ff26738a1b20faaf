"""Exclusive tiers, write budgets and replicas of the compiled engine, beside models of a few lines."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.lab import compiled, replay
from kvstore.lab.compiled import TraceArrays
from kvstore.lab.setup import DISK, HOST, Setup
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest
from tests.kvstore.lab.test_compiled import forest_traffic

pytestmark = pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")


def exclusive_hits(trace: ReplayTrace, host_size: int, disk_size: int) -> list[list[int]]:
    """Two LRUs, a block in one of them; host memory's evictions go down, and a hit comes up. Paths fit host memory."""
    host: OrderedDict[int, None] = OrderedDict()
    disk: OrderedDict[int, None] = OrderedDict()
    rows = []
    for request in trace.requests:
        path = request.blocks
        known = next((i for i, b in enumerate(path) if b not in host and b not in disk), len(path))
        rows.append([sum(b in host for b in path[:known]), sum(b in disk for b in path[:known])])
        for block in reversed(path[:known]):
            disk.pop(block, None)
        for part in (path[:known], path[known:]):
            wanted = [block for block in part if block not in host]
            while len(host) + len(wanted) > host_size:
                victim = next(block for block in host if block not in path)
                del host[victim]
                if len(disk) >= disk_size:
                    del disk[next(block for block in disk if block not in path)]
                disk[victim] = None
            host.update(dict.fromkeys(wanted))
        for block in reversed(path):
            host.move_to_end(block)
            disk.pop(block, None)
    return rows


@pytest.mark.parametrize(("host_size", "disk_size"), [(30, 40), (40, 200), (30, 10_000)])
def test_exclusive_tiers_hold_a_block_once(host_size: int, disk_size: int) -> None:
    trace = forest_traffic(3)
    setup = Setup(((HOST, host_size), (DISK, disk_size)), is_exclusive=True)

    played = compiled.play(TraceArrays.of(trace), setup)

    assert played.hit_blocks.sum(axis=0).min() > 0
    assert played.hit_blocks.tolist() == exclusive_hits(trace, host_size, disk_size)


def test_exclusive_tiers_are_worth_as_much_as_one_of_their_room() -> None:
    arrays = TraceArrays.of(forest_traffic(3))
    tiers = Setup(((HOST, 40), (DISK, 60)), is_exclusive=True)

    both = compiled.play(arrays, tiers).hit_blocks.sum()

    assert both > compiled.play(arrays, replace(tiers, is_exclusive=False)).hit_blocks.sum()
    assert both == pytest.approx(compiled.play(arrays, Setup(((HOST, 100),))).hit_blocks.sum(), rel=0.02)


@pytest.mark.parametrize("is_exclusive", [False, True])
def test_a_tier_that_admits_on_second_use_is_written_less(is_exclusive: bool) -> None:
    arrays = TraceArrays.of(forest_traffic(3))
    setup = Setup(((HOST, 40), (DISK, 200)), is_exclusive=is_exclusive)

    always, second = [
        compiled.play(arrays, replace(setup, admit=admit)).written[1] for admit in ("always", "second_use")
    ]

    assert 0 < second < always


def test_a_budget_bounds_what_is_written_to_disk() -> None:
    trace = forest_traffic(3, num_requests=4000)
    days = (trace.requests[-1].at_s - trace.requests[0].at_s) / 86_400
    setup = Setup(((HOST, 40), (DISK, 200)), writes_per_day=2000)

    written = compiled.play(TraceArrays.of(trace), setup).written[1]

    with_an_hours_share = 2000 * (days + 1 / 24)
    assert 0.9 * with_an_hours_share < written <= with_an_hours_share
    assert written < compiled.play(TraceArrays.of(trace), replace(setup, writes_per_day=None)).written[1]


def test_a_budget_that_is_never_spent_changes_nothing_and_both_engines_agree() -> None:
    trace = forest_traffic(3, num_requests=1000)
    setup = Setup(((HOST, 40), (DISK, 200)), writes_per_day=1_000_000)

    played, planned = compiled.play(TraceArrays.of(trace), setup), replay.play(trace, setup)

    assert played.hit_blocks.tolist() == planned.hit_blocks.tolist()
    assert played.written == planned.written
    assert played.written == compiled.play(TraceArrays.of(trace), replace(setup, writes_per_day=None)).written


def test_a_budget_that_is_spent_lets_both_engines_write_as_much() -> None:
    trace = forest_traffic(3, num_requests=3000)
    setup = Setup(((HOST, 40), (DISK, 200)), writes_per_day=5000)

    # Which pages they write differs: the planner keeps what it owes, the compiled engine tries again at the next use.
    played, planned = compiled.play(TraceArrays.of(trace), setup), replay.play(trace, setup)

    assert planned.hit_blocks[:, 0].tolist() == played.hit_blocks[:, 0].tolist()
    assert planned.written[1] == pytest.approx(played.written[1], abs=8 + 4)  # a batch of debt


@pytest.mark.parametrize(("disk_size", "most_lost"), [(10_000, 0.0), (600, 0.05)])
def test_exclusive_tiers_of_the_planner_lose_what_its_margin_cannot_write_ahead(
    disk_size: int, most_lost: float
) -> None:
    trace = forest_traffic(3, num_requests=2000, width=8, depth=8)
    setup = Setup(((HOST, 800), (DISK, disk_size)), is_exclusive=True)

    played, planned = compiled.play(TraceArrays.of(trace), setup), replay.play(trace, setup)

    assert planned.hit_blocks[:, 0].tolist() == played.hit_blocks[:, 0].tolist()
    from_disk, in_vain = planned.hit_blocks[:, 1].sum(), played.hit_blocks[:, 1].sum() - planned.hit_blocks[:, 1].sum()
    assert from_disk > 0
    assert 0 <= in_vain <= most_lost * played.hit_blocks[:, 1].sum()


def test_a_budget_needs_a_disk_tier() -> None:
    with pytest.raises(ConfigError, match="disk"):
        compiled.play(TraceArrays.of(forest_traffic(3)), Setup(((HOST, 40),), writes_per_day=5))


def test_replicas_in_turn_are_stores_of_every_nth_request() -> None:
    trace = forest_traffic(9)
    setup = Setup(((HOST, 30),), replicas=3, routing="round_robin")

    hits = compiled.play(TraceArrays.of(trace), setup).hit_blocks[:, 0]

    for number in range(3):
        alone = ReplayTrace("every third", trace.block_tokens, trace.requests[number::3])
        expected = compiled.play(TraceArrays.of(alone), Setup(((HOST, 30),))).hit_blocks[:, 0]
        assert hits[number::3].tolist() == expected.tolist()


def test_a_request_goes_where_its_prefix_is_unless_that_replica_is_busy() -> None:
    def at(*times_and_prompts: tuple[float, tuple[int, ...]]) -> list[int]:
        requests = tuple(KvtRequest(t, -1, -1, 512 * len(blocks), 1, blocks) for t, blocks in times_and_prompts)
        setup = Setup(((HOST, 1000),), replicas=4, routing="prefix")
        played = compiled.play(TraceArrays.of(ReplayTrace("two", 512, requests)), setup)
        return played.hit_blocks[:, 0].tolist()

    short, long = (1, 2), tuple(range(1, 200))

    assert at((0.0, long), (60.0, short), (120.0, long)) == [0, 2, 199]
    assert at((0.0, long), (0.01, short)) == [0, 0]  # two blocks are computed sooner elsewhere


def test_a_pool_is_one_store_of_all_room_and_beats_private_ones() -> None:
    arrays = TraceArrays.of(forest_traffic(9))
    private = Setup(((HOST, 20),), replicas=5, routing="round_robin")

    pooled = compiled.play(arrays, replace(private, is_pooled=True)).hit_blocks

    assert np.array_equal(pooled, compiled.play(arrays, Setup(((HOST, 100),))).hit_blocks)
    by_prefix = compiled.play(arrays, replace(private, routing="prefix")).hit_blocks.sum()
    assert pooled.sum() >= by_prefix > compiled.play(arrays, private).hit_blocks.sum()


def test_progress_is_told_and_may_end_a_play() -> None:
    arrays = TraceArrays.of(forest_traffic(1))
    told: list[int] = []

    compiled.play(arrays, Setup(((HOST, 20),)), told.append)

    assert told[-1] == len(arrays.ids)
    with pytest.raises(ZeroDivisionError):
        compiled.play(arrays, Setup(((HOST, 20),)), lambda done: 1 // 0)


def test_arrays_that_are_no_trace_are_refused() -> None:
    arrays = TraceArrays.of(forest_traffic(1))

    with pytest.raises(ValueError, match="trace"):
        compiled.play(replace(arrays, num_blocks=arrays.num_blocks - 1), Setup(((HOST, 20),)))
    with pytest.raises(ValueError, match="times"):
        compiled.play(replace(arrays, times=arrays.times[1:]), Setup(((HOST, 20),)))
    with pytest.raises(ConfigError, match="policy"):
        compiled.play(arrays, Setup(((HOST, 20),), "mine:Own"))
