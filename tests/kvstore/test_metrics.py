from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eviction.registry import make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.metrics import METRICS, MetricKind, markdown, registry, render, unknown_keys
from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from kvstore.store import LocalStore
from kvstore.tiers.host import HostSlab
from kvstore.tiers.memory import MemoryTier
from radix.namespace import Namespace
from tests.helpers.waiting import WAIT_S

ROOT = Path(__file__).resolve().parents[2]


class FakeStore:
    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats
        self.calls = 0

    def stats(self) -> Mapping[str, Any]:
        self.calls += 1
        return self._stats


def samples(store: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(render(store).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_numbers_become_samples_with_the_labels_of_their_nesting() -> None:
    store = FakeStore(
        {
            "lookups": 3,
            "hit_tokens": {"host": 640, "disk": 128},
            "lane_bytes": {"disk": {"fetch": 4096, "spill": 0}},
            "slots": {"free": 2, "resident": 6},
            "tier_latency": {"disk": 0.0025},
        }
    )

    assert samples(store) == {
        ("kvstore_lookups_total", ()): 3.0,
        ("kvstore_hit_tokens_total", (("tier", "host"),)): 640.0,
        ("kvstore_hit_tokens_total", (("tier", "disk"),)): 128.0,
        ("kvstore_lane_bytes_total", (("op", "fetch"), ("tier", "disk"))): 4096.0,
        ("kvstore_lane_bytes_total", (("op", "spill"), ("tier", "disk"))): 0.0,
        ("kvstore_slots", (("state", "free"),)): 2.0,
        ("kvstore_slots", (("state", "resident"),)): 6.0,
        ("kvstore_tier_latency_seconds", (("tier", "disk"),)): 0.0025,
    }


def test_one_scrape_takes_one_snapshot_and_making_a_registry_none() -> None:
    store = FakeStore({"lookups": 1})

    own = registry(store)
    assert store.calls == 0
    list(own.collect())

    assert store.calls == 1


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"lookups": None, "hit_tokens": {}},
        {"lookups": "many"},
        {"lookups": {"host": 1}},
        {"hit_tokens": 5},
        {"hit_tokens": {"host": {"deep": 1}}},
        {"lane_bytes": {"disk": 1}},
        {"something_else": 1},
    ],
)
def test_missing_or_misshapen_numbers_give_no_sample_and_no_error(stats: dict[str, Any]) -> None:
    assert samples(FakeStore(stats)) == {}


def test_labels_may_be_enums_and_any_text() -> None:
    class Reason(Enum):
        DOWN = "tier_down"

    found = samples(FakeStore({"cut": {Reason.DOWN: 1, 'odd "name"\n': 2}}))

    assert found == {
        ("kvstore_matches_cut_total", (("reason", "tier_down"),)): 1.0,
        ("kvstore_matches_cut_total", (("reason", 'odd "name"\n'),)): 2.0,
    }


def test_two_stores_in_one_process_do_not_mix() -> None:
    first, second = FakeStore({"lookups": 1}), FakeStore({"lookups": 2})

    assert [samples(store)[("kvstore_lookups_total", ())] for store in (first, second)] == [1.0, 2.0]


def test_catalogue_has_each_key_and_name_once_in_prometheus_style() -> None:
    assert len({spec.key for spec in METRICS}) == len({spec.name for spec in METRICS}) == len(METRICS)
    for spec in METRICS:
        assert re.fullmatch(r"kvstore_[a-z_]+", spec.name), spec.name
        assert spec.name.endswith("_total") == (spec.kind is MetricKind.COUNTER), spec.name
        assert spec.help.endswith("."), spec.name


def test_written_documentation_is_the_catalogue_of_today() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()

    assert markdown().strip() in page, 'run: python -c "from kvstore.metrics import markdown; print(markdown())"'


# ---- a real store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[LocalStore]:
    layout = Layout(4, (LayerGroup(GroupKind.FULL, (0,), 4096),), "test", "uint8")
    slab = HostSlab(8, layout.slot_bytes, huge_pages=False)
    tier = MemoryTier(capacity_pages=32, slot_bytes=layout.slot_bytes)
    plan = TierPlan("memory", 32, make_policy("lru"), is_indexed=True, is_shared=False)
    lane = Lane(tier, slab.view, workers=1, breaker=Breaker(3, 1.0, 30.0), timeout_s=1.0)
    planner = Planner(layout, PlanSettings(num_slots=8), make_policy("lru"), [plan])
    namespace = Namespace("model", "1", "uint8", layout.fingerprint, 4)
    with LocalStore(layout, namespace, planner, slab, [lane]) as opened:
        yield opened


def save_and_load(store: LocalStore) -> None:
    request = store.request(list(range(9)))  # one more than two blocks: an engine computes at least one token
    lease = store.prepare_save(request, 0, 2)
    store.complete(lease)
    store.lookup(request)
    store.complete(store.prepare_load(request, 2))
    store.flush(WAIT_S)


def test_every_number_of_a_real_store_is_exported(store: LocalStore) -> None:
    save_and_load(store)

    assert unknown_keys(store.stats()) == []


def test_counters_of_a_real_store_follow_what_was_done(store: LocalStore) -> None:
    save_and_load(store)

    found = samples(store)

    assert found[("kvstore_saved_pages_total", ())] == 2.0
    assert found[("kvstore_hit_tokens_total", (("tier", "host"),))] == 8.0
    assert found[("kvstore_slot_bytes", ())] == 4096.0
    assert sum(value for (name, _), value in found.items() if name == "kvstore_slots") == 8.0
