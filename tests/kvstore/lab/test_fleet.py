"""Many machines by simulation: what is shared is hit everywhere, and routing decides where it is hit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.fleet import PD, PREFIX, ROUND_ROBIN, Fleet, FleetPlan, copies_of
from kvstore.lab.traces import ReplayTrace
from kvstore.load.kvt import KvtRequest

BLOCK = 16


def talks(num_talks: int, num_turns: int) -> ReplayTrace:
    """Conversations that take turns and grow by two blocks, a minute apart."""
    requests = []
    for turn in range(num_turns):
        for talk in range(num_talks):
            blocks = tuple(1000 * talk + i for i in range(2 * (turn + 1)))
            at = 60.0 * turn + talk
            requests.append(KvtRequest(at, talk, -1, BLOCK * len(blocks), 10, blocks))
    return ReplayTrace("talks", BLOCK, tuple(requests))


def played(plan: FleetPlan) -> Fleet:
    fleet = Fleet(BLOCK, plan)
    for request in talks(5, 4).requests:
        fleet.serve(request)
    return fleet


def test_prefix_routing_hits_in_host_memory_what_round_robin_does_not() -> None:
    plan = FleetPlan(4, PREFIX, is_pooled=False)
    followed, spread = played(plan).totals, played(replace(plan, routing=ROUND_ROBIN)).totals

    assert followed.host == 5 * (2 + 4 + 6) * BLOCK  # all that a turn before had
    assert spread.host < followed.host
    assert followed.prompt == spread.prompt == 5 * (2 + 4 + 6 + 8) * BLOCK


def test_a_pool_gives_every_replica_what_any_of_them_computed() -> None:
    totals = played(FleetPlan(4, ROUND_ROBIN, is_pooled=True)).totals

    assert totals.host + totals.lower == 5 * (2 + 4 + 6) * BLOCK
    assert totals.lower > 0
    assert totals.computed == 5 * 8 * BLOCK


def test_a_router_that_takes_the_pool_for_a_little_less_finds_the_replica_that_has_the_pages() -> None:
    alike = played(FleetPlan(4, PREFIX, is_pooled=True, shared_worth=1.0))
    weighed = played(FleetPlan(4, PREFIX, is_pooled=True))

    assert alike.totals.computed == weighed.totals.computed
    assert weighed.totals.host == 5 * (2 + 4 + 6) * BLOCK > alike.totals.host
    assert alike.shared is not None
    assert weighed.shared is not None
    assert sum(weighed.shared.read.values()) == 0 < sum(alike.shared.read.values())


def test_decode_loads_from_the_pool_what_prefill_computed() -> None:
    fleet = played(FleetPlan(4, PD))

    assert fleet.decode is not None
    assert (len(fleet.prefill.engines), len(fleet.decode.engines)) == (3, 1)
    assert fleet.shared is not None
    assert sum(fleet.shared.written.values()) == 5 * 8  # each block once
    # The one that decodes has what it loaded before: each block comes to it once.
    assert sum(fleet.shared.read.values()) >= 5 * 8
    assert fleet.totals.computed == 5 * 8 * BLOCK


def test_a_pool_that_is_full_forgets_what_was_used_longest_ago() -> None:
    plan = FleetPlan(2, ROUND_ROBIN, is_pooled=True, host_blocks=8, lower_blocks=4)

    assert played(plan).totals.computed > 5 * 8 * BLOCK


def test_copies_share_no_block_and_keep_their_distances() -> None:
    trace = talks(2, 3)

    stream = list(copies_of(trace, 3, first_s=60.0, span_s=60.0))

    assert len(stream) == 3 * 2
    assert [request.at_s for request in stream] == sorted(request.at_s for request in stream)
    by_copy = [{block for r in stream for block in r.blocks if block % 3 == number} for number in range(3)]
    assert all(len(blocks) == 2 * 4 for blocks in by_copy)
    assert all(0 <= request.at_s <= 31.0 for request in stream)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (FleetPlan(4, "by luck"), "must be one of round-robin, prefix, pd"),
        (FleetPlan(4, PD, is_pooled=False), "is_pooled"),
        (FleetPlan(1, PD), "two replicas"),
    ],
)
def test_what_cannot_be_simulated_is_told(plan: FleetPlan, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Fleet(BLOCK, plan)
