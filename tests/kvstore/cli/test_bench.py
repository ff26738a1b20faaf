from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cli.bench import parse_plan
from kvstore.errors import ConfigError
from kvstore.lab import bench
from kvstore.lab.bench import WORKLOADS, BenchWorkload, Case, Table, measure

runner = CliRunner()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """Two workloads that note how they were run: `toy`, and `toy-dir`, which needs an argument."""
    seen: list[tuple[str, str, bool]] = []

    def run(name: str, argument: str = "", *, quick: bool = False, peer: bool = False) -> list[Table]:
        seen.append((name, argument, quick))
        return [
            measure("sums", "bytes" if argument else "blocks", [Case("sum", lambda: sum(range(99)), 99)], quick=True)
        ]

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setitem(WORKLOADS, "toy", BenchWorkload("adds numbers", "nowhere"))
    monkeypatch.setitem(WORKLOADS, "toy-dir", BenchWorkload("adds numbers in a directory", "nowhere", "DIR"))
    return seen


def test_without_a_workload_the_list_is_printed() -> None:
    result = runner.invoke(app, ["bench"])

    assert result.exit_code == 0
    for name, workload in WORKLOADS.items():
        assert name in result.stdout
        assert workload.summary in result.stdout


def test_workloads_run_in_order_with_their_arguments(toy: list[tuple[str, str, bool]]) -> None:
    result = runner.invoke(app, ["bench", "toy-dir", "/data", "toy", "--quick"])

    assert result.exit_code == 0
    assert toy == [("toy-dir", "/data", True), ("toy", "", True)]
    assert "toy-dir: sums" in result.stdout
    assert "µs/block" in result.stdout


def test_json_has_machine_versions_and_timings(toy: list[tuple[str, str, bool]], tmp_path: Path) -> None:
    result = runner.invoke(app, ["bench", "toy", "--json", "--out", str(tmp_path / "out.json")])

    report = json.loads(result.stdout)
    assert report["versions"]["python"]
    assert report["machine"]["cores"] >= 1
    (table,) = report["workloads"]["toy"]
    assert table["timings"][0]["name"] == "sum"
    assert table["timings"][0]["ratio"] == 1.0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["workloads"] == report["workloads"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hsh"], "workload 'hsh' is unknown; known are hash"),
        (["hash", "disk"], "workload disk needs DIR; write kvstore bench disk DIR"),
        (["disk", "hash"], "workload disk needs DIR; write kvstore bench disk DIR"),
    ],
)
def test_bad_plan_is_told_before_anything_runs(words: list[str], told: str) -> None:
    result = runner.invoke(app, ["bench", *words])

    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stdout == ""


def test_plan_gives_arguments_to_those_who_need_them() -> None:
    needs = {"hash": "", "disk": "DIR"}

    assert parse_plan(["hash", "disk", "/d", "hash"], needs) == [("hash", ""), ("disk", "/d"), ("hash", "")]
    with pytest.raises(ConfigError):
        parse_plan(["/d"], needs)
