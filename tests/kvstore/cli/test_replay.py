"""`kvstore replay`: a table for people, records for programs, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from tests.kvstore.lab.test_optimum import tree_traffic

runner = CliRunner()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    with path.open("w") as file:
        for number, blocks in enumerate(tree_traffic(1, num_requests=120, width=4, depth=5)):
            record = {"timestamp": number * 1000, "input_length": 512 * len(blocks), "output_length": 1}
            file.write(json.dumps(record | {"hash_ids": blocks}) + "\n")
    return path


def test_a_table_shows_each_policy_between_lru_and_the_optimum(trace: Path) -> None:
    result = runner.invoke(app, ["replay", str(trace), "--host", "5%,20%", "--policy", "s3fifo"])

    assert result.exit_code == 0
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip() and line.split()[1:2] != ["blocks"]]
    assert rows.count("optimum") == rows.count("lru") == rows.count("s3fifo") == 2
    assert "traffic: 120 requests" in result.stdout


def test_records_are_printed_and_written(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"

    printed = runner.invoke(app, ["replay", str(trace), "--host", "16", "--json", "-", "--details", str(out)])

    (cell,), (details,) = json.loads(printed.stdout), json.loads(out.read_text())
    assert (cell["trace"], cell["policy"], cell["capacity"], cell["requests"]) == ("traffic", "lru", 16, 120)
    assert details.items() >= cell.items()
    assert details["tiers"] == {"host": 16}


def test_lists_and_ranges_of_every_tier_are_played(trace: Path) -> None:
    options = ["--host", "8..32", "--disk", "0,50%", "--json", "-"]

    cells = json.loads(runner.invoke(app, ["replay", str(trace), *options]).stdout)

    assert [(cell["capacity"], list(cell["hit_rate_by_tier"])) for cell in cells] == [
        (size, tiers) for size in (8, 16, 32) for tiers in (["host"], ["host", "disk"])
    ]


def test_shares_of_hints_are_rows_of_their_own(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"

    table = runner.invoke(app, ["replay", str(trace), "--host", "16", "--hints", "0%,50%", "--details", str(out)])

    assert "lru, 50% hints" in table.stdout
    assert [cell["hints"] for cell in json.loads(out.read_text())] == [0.0, 0.5]


def tool_loops(path: Path) -> Path:
    """Four sessions that come back after 100 s, above what is asked once and pushes them out of host memory."""
    events = [(100.0 * turn + 25.0 * session, session, turn) for turn in range(40) for session in range(4)]
    events += [(at + 5.0 * number, -1, 0) for at, *_ in events for number in range(3)]
    lines, last = [{"format": "kvt1", "block_tokens": 16, "name": "loops"}], {}
    for number, (at, session, turn) in enumerate(sorted(events)):
        head = last.get(session, -1)
        fresh = [[1000 * (number + 1), 8 if session < 0 else 4 if head < 0 else 1]]
        known = 0 if head < 0 else 3 + turn
        size = 16 * (known + fresh[0][1])
        lines.append({"t": at, "s": session, "in": size, "out": 1, "p": head, "k": known, "h": fresh, "x": "tool_use"})
        if session >= 0:
            last[session] = number
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_speculation_is_a_row_of_its_own_with_what_it_brought_and_wasted(tmp_path: Path) -> None:
    trace = tool_loops(tmp_path / "loops.kvt")
    options = ["replay", str(trace), "--host", "200", "--disk", "100%", "--speculate", "1"]

    table = runner.invoke(app, options, env={"COLUMNS": "160"})
    plain, ahead = json.loads(runner.invoke(app, [*options, "--json", "-"]).stdout)

    assert "ahead 1" in table.stdout
    assert "to host" in table.stdout
    assert "speculation" not in plain
    gain = ahead["speculation"]
    assert gain["used"] + gain["wasted"] <= gain["brought"]
    assert gain["turned"] > 0.1
    assert gain["wasted_per_used"] < 1
    rates = ahead["hit_rate_by_tier"], plain["hit_rate_by_tier"]
    assert rates[0]["host"] - rates[1]["host"] == pytest.approx(gain["turned"] * rates[1]["disk"])


def test_a_time_to_live_costs_hits(trace: Path) -> None:
    result = runner.invoke(app, ["replay", str(trace), "--host", "100%", "--ttl", "2s", "--json", "-"])

    (cell,) = json.loads(result.stdout)
    assert cell["token_hit_rate"] < cell["lru"] == cell["min"]


def test_gpus_that_get_more_than_they_can_do_are_warned_of(trace: Path) -> None:
    options = ["replay", str(trace), "--host", "5%", "--model", "llama-3-70b", "--gpu", "a100"]

    busy, idle = runner.invoke(app, options), runner.invoke(app, [*options, "--replicas", "8"])

    assert "times the work that they can do" in busy.stdout.replace("\n", " ")
    assert busy.stdout.count("!") > 1
    assert "!" not in idle.stdout


def test_quality_ttft_concurrency_and_cost_stand_in_one_table(trace: Path) -> None:
    options = ["--host", "5%", "--redis", "50%", "--codec", "exact,lossless", "--price", "gpu=2"]

    result = runner.invoke(app, ["replay", str(trace), *options])

    assert result.exit_code == 0
    assert "gpu=2 an hour; host=4, disk=0.1, redis=12 a GiB and month" in result.stdout
    for column in ("quality", "TTFT p50", "requests/s", "sessions", "$ a month", "$ a million"):
        assert column in result.stdout
    assert "(lossless)" in result.stdout


def test_advice_is_in_plain_words(trace: Path) -> None:
    result = runner.invoke(app, ["replay", str(trace), "--advise", "90%", "--disk", "0,100%"])

    assert result.exit_code == 0
    told = result.stdout
    for words in (
        "For 90 % of that: host",
        "holds ",
        "sessions",
        "writes  a day",
        "a million prompt tokens",
        "One step up",
    ):
        assert words in told
    assert "Instead, host" in told


def test_advice_that_cannot_be_followed_is_told(trace: Path) -> None:
    result = runner.invoke(app, ["replay", str(trace), "--advise", "99%", "--host", "1"])

    assert result.exit_code == 0
    assert "99 % of that is not reached by host" in result.stdout


def test_an_empty_trace_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")

    result = runner.invoke(app, ["replay", str(path), "--advise", "90%"])

    assert result.exit_code == 2
    assert "empty.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy", "best"], "--policy best: it must be one of lru, outlook, s3fifo, sieve"),
        (["--host", "many"], "capacity is 'many'"),
        (["--host", ","], "names nothing"),
        (["--host", "5%..1%"], "goes down"),
        (["--disk", "1TiB..2TiB+1KiB"], "less than one block"),
        (["--codec", "zip"], "it must be one of exact, lossless"),
        (["--price", "gold=1"], "write NAME=DOLLARS"),
        (["--advise", "most"], "such as 95%"),
        (["--json", "/nowhere/a.json"], "the directory /nowhere is not there"),
        (["--model", "llama"], "it must be one of llama-3-8b"),
        (["--gpu", "abacus"], "it must be one of a100"),
        (["--media", "disk=tape"], "write TIER=MEDIUM"),
        (["--routing", "best"], "it must be one of round_robin, prefix"),
        (["--admit", "never"], "it must be one of always"),
        (["--engine", "steam"], "it must be one of auto, planner, compiled"),
        (["--exclusive"], "give --disk or --redis"),
        (["--writes-per-day", "100", "--redis", "50%"], "give --disk"),
        (["--speculate", "1"], "give --disk or --redis"),
        (["--speculate", "some", "--disk", "50%"], "--speculate is 'some'"),
        (["--speculate", "1", "--disk", "50%", "--replicas", "2"], "in one store"),
        (["--hints", "0.5"], "write a share of the requests, 0% to 100%"),
        (["--hints", "200%"], "--hints is '200%'"),
        (["--ttl", "soon"], "--ttl soon: a time is"),
        (["--ttl", "0"], "it must be positive"),
        (["--block-size", "16"], "is the block size another one?"),
    ],
)
def test_what_cannot_be_is_one_line(trace: Path, options: list[str], told: str) -> None:
    result = runner.invoke(app, ["replay", str(trace), *options])

    assert result.exit_code == 2
    assert told in result.stderr


def test_a_file_that_is_not_there_is_one_line() -> None:
    result = runner.invoke(app, ["replay", "/nowhere/trace.jsonl"])

    assert result.exit_code == 2
    assert "/nowhere/trace.jsonl: No such file or directory" in result.stderr
