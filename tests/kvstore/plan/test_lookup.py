"""What lookups count."""

from __future__ import annotations

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.planner import Planner
from kvstore.plan.records import Op, Outcome, PlanSettings, Request, RequestOptions
from kvstore.plan.tier_plan import TierPlan
from radix.hashing import BlockHash

BLOCK = 4
LAYOUT = Layout(BLOCK, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")
REDIS = TierPlan("redis", None, None, is_indexed=False, is_shared=True, window_pages=64)


def planner_and_request() -> tuple[Planner, Request]:
    planner = Planner(LAYOUT, PlanSettings(16, load_or_recompute=False), make_policy("lru"), [REDIS])
    keys = [BlockHash(bytes([i]) * 32) for i in range(3)]
    return planner, Request(1, keys, 3 * BLOCK + 1, RequestOptions())


def test_a_lookup_given_up_while_redis_is_silent_counts_when_its_request_ends() -> None:
    planner, request = planner_and_request()
    assert planner.lookup(request, 0.0).pending
    assert planner.lookups.counters["lookups"] == 0

    planner.finished(request, 1.0)

    counters = planner.lookups.counters
    assert (counters["lookups"], counters["matched_tokens"], counters["missed_tokens"]) == (1, 0, request.num_tokens)
    planner.finished(request, 2.0)
    assert counters["lookups"] == 1


def test_a_lookup_that_was_answered_counts_once() -> None:
    planner, request = planner_and_request()
    assert planner.lookup(request, 0.0).pending
    for transfer in planner.take_transfers():
        assert transfer.op is Op.PROBE
        planner.outcome(Outcome(transfer.id, (True,) * len(transfer.keys), 0.001), 0.1)
    assert not planner.lookup(request, 0.2).pending

    planner.finished(request, 1.0)

    counters = planner.lookups.counters
    assert (counters["lookups"], counters["matched_tokens"]) == (1, 3 * BLOCK)
