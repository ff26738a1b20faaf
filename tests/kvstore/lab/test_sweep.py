"""Cells of a sweep stand between LRU and the optimum; a picture is drawn of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.lab import compiled
from kvstore.lab.cell import ReplayCell
from kvstore.lab.hardware import MEDIA
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.setup import DISK, HOST, REDIS, Setup
from kvstore.lab.sweep import Player, floor_of, num_plays, setups_of
from kvstore.lab.sweep_plot import draw_sweep
from kvstore.lab.timing import Costs
from tests.kvstore.lab.test_optimum import trace_of, tree_traffic

TRACE = trace_of(*tree_traffic(7, num_requests=400, width=5, depth=6))
COSTS = Costs(media={HOST: MEDIA["pcie5"], DISK: MEDIA["nvme"], REDIS: MEDIA["redis-25g"]})
PLAYER = Player(TRACE, COSTS)
BASE = Setup(((HOST, 1),))


def cells_of(
    sizes: list[int], policies: list[str], base: Setup = BASE, lower: tuple[list[tuple[str, int]], ...] = ()
) -> list[ReplayCell]:
    rooms = [[(HOST, size) for size in sizes], *lower]
    return [PLAYER.cell(setup) for setup in setups_of(base, rooms, policies)]


def test_cells_come_by_capacity_and_policy_with_floor_and_ceiling() -> None:
    cells = cells_of([30, 100], ["lru", "s3fifo"])

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


def test_where_floor_and_ceiling_meet_nothing_is_closed() -> None:
    (cell,) = cells_of([TRACE.num_distinct], ["lru"])

    assert (cell.share, cell.lru, cell.lru_gap_closed) == (1.0, cell.min, None)


def test_a_time_to_live_is_the_policys_and_not_the_floors() -> None:
    (cell,) = cells_of([TRACE.num_distinct], ["lru"], Setup(((HOST, 1),), ttl_s=5.0))

    assert cell.token_hit_rate < cell.lru


def test_each_policy_is_played_with_each_share_of_hints_over_a_floor_without() -> None:
    setups = setups_of(BASE, [[(HOST, 30)]], ["lru", "sieve"], hints=[0.0, 0.5])
    cells = [PLAYER.cell(setup) for setup in setups]

    assert [(cell.policy, cell.setup.hints, cell.engine) for cell in cells] == [
        ("lru", 0.0, "compiled" if compiled.is_built else "planner"),
        ("lru", 0.5, "planner"),
        ("sieve", 0.0, "compiled" if compiled.is_built else "planner"),
        ("sieve", 0.5, "planner"),
    ]
    # This trace has no sessions and no finish reasons: clients have nothing to say.
    assert cells[0].token_hit_rate == cells[1].token_hit_rate == cells[0].lru


def test_a_tier_below_adds_hits_of_its_own_and_what_is_written_is_told() -> None:
    (alone,) = cells_of([30], ["lru"])
    (cell,) = cells_of([30], ["lru"], lower=([(DISK, 200)],))

    assert cell.as_details()["tiers"] == {"host": 30, "disk": 200}
    assert cell.hit_rate_by_tier["host"] == pytest.approx(alone.token_hit_rate)
    assert cell.hit_rate_by_tier["disk"] > 0 < cell.written["disk"]
    assert cell.min >= cell.token_hit_rate > alone.token_hit_rate
    assert sorted(cell.as_details()["ttft_s"]) == ["p50", "p95", "p99"]
    assert list(cell.ttft_s) == sorted(cell.ttft_s)


def test_records_have_the_promised_keys_and_no_others() -> None:
    (cell,) = cells_of([30], ["lru"])

    assert sorted(cell.as_record()) == [
        "capacity",
        "computed_tokens",
        "hit_rate_by_tier",
        "lru",
        "lru_gap_closed",
        "min",
        "policy",
        "prefill_time_saved",
        "requests",
        "seconds",
        "token_hit_rate",
        "trace",
    ]


def test_each_choice_of_rooms_and_policy_is_a_setup_and_a_room_of_nothing_is_none() -> None:
    rooms = [[(HOST, 10), (HOST, 20)], [(DISK, 0), (DISK, 50)], [(REDIS, 0), (REDIS, 70)]]

    setups = setups_of(Setup(BASE.tiers, is_exclusive=True), rooms, ["lru", "sieve"], ["exact", "lossless"])

    assert len(setups) == 2 * 2 * (1 + 1 + 2 + 2)  # sizes, policies, lower tiers and codecs
    assert {setup.codec for setup in setups if REDIS not in setup.names} == {"exact"}
    assert {setup.is_exclusive for setup in setups if len(setup.tiers) == 1} == {False}
    assert {setup.names for setup in setups} == {
        (HOST,), (HOST, DISK), (HOST, REDIS), (HOST, DISK, REDIS)
    }  # fmt: skip


def test_a_write_budget_is_only_of_setups_that_have_a_disk() -> None:
    base = Setup(BASE.tiers, writes_per_day=7)

    setups = setups_of(base, [[(HOST, 10)], [(DISK, 0), (DISK, 50)], [(REDIS, 70)]], ["lru"])

    assert {setup.names: setup.writes_per_day for setup in setups} == {(HOST, REDIS): None, (HOST, DISK, REDIS): 7}


def test_the_floor_of_a_forecasting_setup_forecasts_nothing() -> None:
    setup = Setup(((HOST, 10), (DISK, 20)), "outlook", ttl_s=5.0, admit="predicted")

    assert floor_of(setup) == Setup(((HOST, 10), (DISK, 20)), "lru")


def test_progress_is_told_and_ends_where_it_was_said_to() -> None:
    player = Player(TRACE, COSTS)
    told: list[int] = []
    player.on_progress = lambda what, num_done: told.append(num_done)
    setups = setups_of(BASE, [[(HOST, 30), (HOST, 100)]], ["lru", "s3fifo"])

    for setup in setups:
        player.cell(setup)

    assert told == sorted(told)
    assert told[-1] == num_plays(setups) * player.num_references


def test_planes_hold_more_and_load_faster_where_the_network_is_slow() -> None:
    slow = Costs(media=COSTS.media | {REDIS: MEDIA["redis-10g"]})
    exact, lossless = (
        slow.model(Setup(((HOST, 1), (REDIS, 9)), codec=codec)).load_s(1, 1000) for codec in ("exact", "lossless")
    )

    assert 1.4 < exact / lossless < 1.45


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = cells_of([30, 100], ["lru", "sieve"], lower=([(DISK, 0), (DISK, 200)],))

    draw_sweep(cells, {cells[0].trace: PLAYER.nothing().percentiles()}, tmp_path / "new" / "rates.png")

    assert (tmp_path / "new" / "rates.png").read_bytes().startswith(b"\x89PNG")
