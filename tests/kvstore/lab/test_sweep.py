"""Cells of a sweep stand between LRU and the optimum; capacities are read as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.lab import compiled
from kvstore.lab.geometry import PRESETS
from kvstore.lab.hardware import GPUS, MEDIA
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.player import Player
from kvstore.lab.setup import DISK, HOST, Setup
from kvstore.lab.sweep import parse_capacity, sweep
from kvstore.lab.sweep_plot import draw_rates
from kvstore.lab.timing import PrefillModel
from tests.kvstore.lab.test_optimum import trace_of, tree_traffic

TRACE = trace_of(*tree_traffic(7, num_requests=400, width=5, depth=6))
PLAYER = Player(TRACE)
MODEL = PrefillModel(PRESETS["llama-3-8b"], GPUS["h100"], (MEDIA["pinned"], MEDIA["nvme"]))


def test_cells_come_by_capacity_and_policy_with_floor_and_ceiling() -> None:
    steps: list[str] = []
    cells = list(sweep(PLAYER, MODEL, [30, 100], ["lru", "s3fifo"], on_step=steps.append))

    assert [(cell.capacity, cell.policy) for cell in cells] == [
        (30, "lru"),
        (30, "s3fifo"),
        (100, "lru"),
        (100, "s3fifo"),
    ]
    for cell in cells:
        assert cell.min == optimal_hit_tokens(TRACE, cell.capacity) / TRACE.prompt_tokens
        assert cell.computed_tokens == round((1 - cell.token_hit_rate) * TRACE.prompt_tokens)
        assert cell.lru_gap_closed == pytest.approx((cell.token_hit_rate - cell.lru) / (cell.min - cell.lru))
        assert sum(cell.hit_rate_by_tier.values()) == pytest.approx(cell.token_hit_rate)
        assert json.loads(json.dumps(cell.as_record()))["requests"] == 400
    assert cells[0].lru_gap_closed == 0.0
    assert len(steps) == 6


def test_where_floor_and_ceiling_meet_nothing_is_closed() -> None:
    (cell,) = sweep(PLAYER, MODEL, [TRACE.num_distinct], ["lru"])

    assert (cell.share, cell.lru, cell.lru_gap_closed) == (1.0, cell.min, None)


def test_a_time_to_live_is_the_policys_and_not_the_floors() -> None:
    (cell,) = sweep(PLAYER, MODEL, [TRACE.num_distinct], ["lru"], Setup(((HOST, 1),), ttl_s=5.0))

    assert cell.token_hit_rate < cell.lru


def test_each_policy_is_played_with_each_share_of_hints_over_a_floor_without() -> None:
    cells = list(sweep(PLAYER, MODEL, [30], ["lru", "sieve"], hints=[0.0, 0.5]))

    assert [(cell.policy, cell.hints, cell.engine) for cell in cells] == [
        ("lru", 0.0, "compiled" if compiled.is_built else "planner"),
        ("lru", 0.5, "planner"),
        ("sieve", 0.0, "compiled" if compiled.is_built else "planner"),
        ("sieve", 0.5, "planner"),
    ]
    # This trace has no sessions and no finish reasons: clients have nothing to say.
    assert cells[0].token_hit_rate == cells[1].token_hit_rate == cells[0].lru


def test_a_tier_below_adds_hits_of_its_own_and_what_is_written_is_told() -> None:
    (alone,) = sweep(PLAYER, MODEL, [30], ["lru"])
    (cell,) = sweep(PLAYER, MODEL, [30], ["lru"], Setup(((HOST, 1), (DISK, 200))))

    assert cell.tiers == {"host": 30, "disk": 200}
    assert cell.hit_rate_by_tier["host"] == pytest.approx(alone.token_hit_rate)
    assert cell.hit_rate_by_tier["disk"] > 0 < cell.written["disk"]
    assert cell.min >= cell.token_hit_rate > alone.token_hit_rate
    assert sorted(cell.ttft_s) == ["p50", "p95", "p99"]


def test_capacities_are_shares_blocks_or_sizes() -> None:
    assert parse_capacity("10%", TRACE, None) == TRACE.num_distinct // 10
    assert parse_capacity(" 250 ", TRACE, None) == 250
    assert parse_capacity("4Ktokens", TRACE, None) == parse_capacity("0.004M tokens", TRACE, None) == 1000
    assert parse_capacity("1MiB", TRACE, 1024) == 256  # 4 tokens a block


@pytest.mark.parametrize(
    "text", ["0%", "-5%", "0", "x", "5 apples", "%", "1KiB", "3tokens", "Mtokens", "inf%", "\u00b2"]
)
def test_capacities_that_make_no_sense_are_told(text: str) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        parse_capacity(text, TRACE, 1024)


def test_a_size_needs_to_know_how_large_a_token_is() -> None:
    with pytest.raises(ConfigError, match="--bytes-per-token"):
        parse_capacity("64GiB", TRACE, None)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    draw_rates(list(sweep(PLAYER, MODEL, [30, 100], ["lru", "sieve"])), tmp_path / "new" / "rates.png")

    assert (tmp_path / "new" / "rates.png").read_bytes().startswith(b"\x89PNG")
