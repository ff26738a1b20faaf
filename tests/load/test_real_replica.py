"""The load generator against a real replica on a tiny random model: what it reports is what the replica did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvstore.cli.app import app
from tests.helpers.replicas import REPLICA_OPTIONS, Server, end_all, make_model

runner = CliRunner()


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    options = ("--model", str(model), "--name", "the-replica", *REPLICA_OPTIONS)
    server = Server(tmp_path_factory.mktemp("replica"), "replica", *options)
    try:
        server.wait_ready()
        yield server
    finally:
        end_all([server])


def load(replica: Server, path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = runner.invoke(app, ["load", "--url", replica.url, "--json", str(path / "run.json"), *arguments])
    assert (path / "run.json").exists(), result.output
    return result, json.loads((path / "run.json").read_text())


def hit_tokens_of(replica: Server) -> int:
    """What the replica itself counts."""
    lines = replica.get("/metrics").raw.decode().splitlines()
    hits = [line for line in lines if line.startswith("kvstore_hit_tokens_total")]
    assert hits, lines
    return sum(int(float(line.split()[-1])) for line in hits)


def test_shared_prompt_hits_and_answers_the_same_texts(replica: Server, tmp_path: Path) -> None:
    arguments = ("--requests", "8", "--system-tokens", "100", "--question-tokens", "10", "--answer-tokens", "8")

    result, written = load(replica, tmp_path, *arguments, "--baseline", "--concurrency", "1")

    assert result.exit_code == 0, result.output
    assert "all 8 answers are the same text" in result.stdout
    with_cache, without = written["runs"]
    assert with_cache["all"]["hit_rate"] > 0.5
    assert without["all"]["hit_tokens"] == {"host": 0, "disk": 0, "redis": 0}
    assert list(with_cache["by_replica"]) == ["the-replica"]
    assert all(record["completion_tokens"] == 8 for record in with_cache["records"])
    assert all(record["stages"]["prefill_s"] > 0 for record in with_cache["records"])


def test_hit_tokens_are_those_that_the_replica_counts(replica: Server, tmp_path: Path) -> None:
    before = hit_tokens_of(replica)

    _, written = load(
        replica, tmp_path, "-w", "long-doc", "--documents", "2", "--document-tokens", "60", "--asks", "3", "-c", "1",
        "--seed", "5", "--warmup", "0", "--answer-tokens", "4",
    )  # fmt: skip

    assert sum(written["runs"][0]["all"]["hit_tokens"].values()) == hit_tokens_of(replica) - before
    assert written["runs"][0]["by_part"]["asked again"]["hit_rate"] > 0.3


def test_rounds_go_on_from_real_answers_with_the_same_texts_in_both_runs(replica: Server, tmp_path: Path) -> None:
    result, written = load(
        replica, tmp_path, "-w", "multi-round", "--users", "2", "--rounds", "3", "--system-tokens", "40",
        "--history-tokens", "30", "--question-tokens", "6", "--answer-tokens", "8", "--baseline", "--seed", "9",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert written["comparison"]["same"] == 6
    rates = [written["runs"][0]["by_part"][f"round {n}"]["hit_rate"] for n in (1, 2, 3)]
    assert rates[2] > rates[0]
    prompts = [[record["prompt_tokens"] for record in run["records"]] for run in written["runs"]]
    assert prompts[0] == prompts[1]


def test_trace_hits_as_its_blocks_say(replica: Server, tmp_path: Path) -> None:
    header = {"format": "kvt1", "block_tokens": 64}
    first = {"t": 0, "s": -1, "in": 320, "out": 4, "p": -1, "k": 0, "h": [[0, 5]]}
    second = {"t": 1, "s": -1, "in": 320, "out": 4, "p": 0, "k": 3, "h": [[5, 2]]}
    trace = tmp_path / "made.kvt"
    trace.write_text("\n".join(json.dumps(line) for line in (header, first, second)))

    result, written = load(
        replica, tmp_path, "-w", "trace", "--trace", str(trace), "--vocab-size", "256", "--trace-times", "--warmup", "0"
    )

    assert result.exit_code == 0, result.output
    records = written["runs"][0]["records"]
    assert [record["prompt_tokens"] for record in records] == [320, 320]
    assert [record["cached_tokens"] for record in records] == [0, 192]


def test_open_loop_is_reported_with_its_queue(replica: Server, tmp_path: Path) -> None:
    result, written = load(
        replica, tmp_path, "-w", "no-reuse", "--requests", "6", "--prompt-tokens", "50", "--rate", "200", "--seed", "3"
    )

    assert result.exit_code == 0, result.output
    run = written["runs"][0]
    assert run["all"]["hit_rate"] == 0
    assert run["stages"]["queue_s"]["count"] == 6
    assert run["late_s"]["count"] == 6
