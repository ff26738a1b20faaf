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
    result = runner.invoke(app, ["replay", str(trace), "--capacity", "5%,20%", "--policy", "s3fifo"])

    assert result.exit_code == 0
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip() and line.split()[1:2] != ["blocks"]]
    assert rows.count("optimum") == rows.count("lru") == rows.count("s3fifo") == 2
    assert "traffic: 120 requests" in result.stdout


def test_records_are_printed_and_written(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.json"

    result = runner.invoke(app, ["replay", str(trace), "--capacity", "16", "--json", "--out", str(out)])

    (cell,) = json.loads(result.stdout)
    assert (cell["trace"], cell["policy"], cell["capacity"], cell["requests"]) == ("traffic", "lru", 16, 120)
    assert json.loads(out.read_text()) == [cell]


def test_shares_of_hints_are_rows_of_their_own(trace: Path) -> None:
    table = runner.invoke(app, ["replay", str(trace), "--capacity", "16", "--hints", "0%,50%"])
    records = runner.invoke(app, ["replay", str(trace), "--capacity", "16", "--hints", "0%,50%", "--json"])

    assert "lru, 50% hints" in table.stdout
    assert [cell["hints"] for cell in json.loads(records.stdout)] == [0.0, 0.5]


def test_a_time_to_live_costs_hits(trace: Path) -> None:
    result = runner.invoke(app, ["replay", str(trace), "--capacity", "100%", "--ttl", "2s", "--json"])

    (cell,) = json.loads(result.stdout)
    assert cell["token_hit_rate"] < cell["lru"] == cell["min"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy", "best"], "--policy best: it must be one of lru, outlook, s3fifo, sieve"),
        (["--capacity", "many"], "capacity is 'many'"),
        (["--capacity", ","], "names nothing"),
        (["--model", "llama"], "it must be one of llama-3-8b"),
        (["--gpu", "abacus"], "it must be one of a100"),
        (["--media", "disk=tape"], "write TIER=MEDIUM"),
        (["--routing", "best"], "it must be one of round_robin, prefix"),
        (["--admit", "never"], "it must be one of always"),
        (["--engine", "steam"], "it must be one of auto, planner, compiled"),
        (["--exclusive"], "give --disk or --redis"),
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
