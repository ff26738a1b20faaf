"""While tiers fail under a running model, every answer has the tokens of a model without a store."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from connectors.transformers.identity import model_namespace
from connectors.transformers.layout import model_layout
from eviction.registry import make_policy
from kvstore.plan.tier_plan import TierPlan
from kvstore.tiers.memory import MemoryTier
from tests.helpers.faulty_tier import Chances, FaultyTier
from tests.helpers.stores import store_over
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S, wait_until

BLOCK = 16
CHUNK = 32
NEW_TOKENS = 4
SHARED = random_ids(96, seed=1)
# Three prompts with a common head and one of its own: more than the host slots hold, so pages come from below.
PROMPTS = [SHARED + random_ids(40, seed=2 + n) for n in range(3)] + [random_ids(150, seed=9)]


@pytest.fixture(scope="module", params=["llama_gqa", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param, "bfloat16")


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    cold = KVCacheModel(model, prefill_chunk=CHUNK)
    return [cold.generate(ids, NEW_TOKENS).tokens for ids in PROMPTS]


@contextmanager
def over_faulty_tier(
    model: Any, *, timeout_s: float = 1.0, is_indexed: bool = True, **settings: Any
) -> Iterator[tuple[KVCacheModel, FaultyTier]]:
    """A model over little host memory and one faulty tier below it."""
    layout = model_layout(model, BLOCK)
    tier = FaultyTier(MemoryTier(2000, layout.slot_bytes))
    plan = TierPlan("memory", 2000 if is_indexed else None, make_policy("lru"), is_indexed, not is_indexed, workers=2)
    store = store_over(
        [(tier, plan)],
        num_slots=14 * len(layout.groups),
        layout=layout,
        timeout_s=timeout_s,
        **{"load_or_recompute": False, "load_deadline_s": 2.0} | settings,
    )
    store.namespace = model_namespace(model, layout, prefill_chunk=CHUNK)  # the helper's own is that of its test pages
    with store, KVCacheModel(model, store, prefill_chunk=CHUNK) as kv:
        yield kv, tier
        assert kv.flush(WAIT_S)
        tier.recover()
        store.flush(WAIT_S)
        store.check()
        stats = store.stats()
        assert stats["leases"] == stats["pinned_pages"] == 0
        assert kv.connector is not None
        assert kv.connector.counters.load_failures == kv.connector.counters.save_failures == 0


def ask_all(kv: KVCacheModel, expected: list[list[int]], rounds: int = 1) -> int:
    """Ask every prompt; returns the tokens that were reused."""
    reused = 0
    for _ in range(rounds):
        for ids, tokens in zip(PROMPTS, expected, strict=True):
            answer = kv.generate(ids, NEW_TOKENS)
            assert answer.tokens == tokens
            reused += answer.report.reused_tokens
            assert kv.flush(WAIT_S)
    return reused


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize(
    "chances",
    [
        Chances(lose=0.3),
        Chances(corrupt=0.3),
        Chances(unavailable=0.4),
        Chances(unexpected=0.4),
        Chances(slow=0.5, slow_s=0.02),
        Chances(lose=0.1, corrupt=0.1, unavailable=0.1, unexpected=0.1, slow=0.1, slow_s=0.01),
    ],
    ids=["lose", "corrupt", "unavailable", "unexpected", "slow", "all"],
)
def test_tokens_are_the_same_whatever_the_tier_does(
    model: Any, expected: list[list[int]], chances: Chances, is_indexed: bool
) -> None:
    with over_faulty_tier(model, is_indexed=is_indexed) as (kv, tier):
        ask_all(kv, expected)
        tier.chances = chances
        ask_all(kv, expected, rounds=4)

        assert sum(tier.calls.values()) > 10  # it was really asked
        assert kv.connector is not None
        assert kv.connector.counters.loads > 0


def test_a_tier_that_hangs_costs_a_deadline_and_no_more(model: Any, expected: list[list[int]]) -> None:
    with over_faulty_tier(model, timeout_s=0.2, load_deadline_s=0.3) as (kv, tier):
        ask_all(kv, expected, rounds=2)
        tier.hang()

        began = time.monotonic()
        ask_all(kv, expected)
        waited = time.monotonic() - began

        tier.recover()
        # Four requests, each with one load deadline and one lookup deadline at most; computing is a few milliseconds.
        # Ten times that would still show a wait without a bound (a hang lasts 60 s).
        assert waited < 10 * 4 * (0.3 + 0.5)


def test_after_the_tier_came_back_its_pages_are_used_again(model: Any, expected: list[list[int]]) -> None:
    with over_faulty_tier(model) as (kv, tier):
        ask_all(kv, expected, rounds=2)
        tier.fail()
        ask_all(kv, expected, rounds=2)
        tier.recover()

        assert kv.connector is not None
        stats = kv.connector._store.stats  # type: ignore[attr-defined]
        wait_until(lambda: not stats()["breaker_open"]["memory"])
        before = stats()["hit_blocks"]["memory"]
        ask_all(kv, expected, rounds=2)

        assert kv.connector._store.stats()["hit_blocks"]["memory"] > before  # type: ignore[union-attr]


def test_a_page_lost_in_the_middle_is_computed_and_saved_again(model: Any, expected: list[list[int]]) -> None:
    with over_faulty_tier(model) as (kv, tier):
        ask_all(kv, expected, rounds=2)
        assert kv.connector is not None
        kv.connector._store.flush(WAIT_S)
        tier.lose_next(1)

        first = ask_all(kv, expected)
        ask_all(kv, expected)
        kv.connector._store.flush(WAIT_S)
        healed = ask_all(kv, expected)

        assert healed >= first
        assert kv.connector.counters.short_loads >= 1
