"""`kvstore load` as it is typed, against the fake server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvstore.cli.app import app
from tests.helpers.openai_server import Behaviour, FakeServer
from tests.helpers.waiting import WAIT_S, wait_until

runner = CliRunner()
SMALL = ["--requests", "6", "--system-tokens", "64", "--question-tokens", "8", "--answer-tokens", "5"]


def load(server: FakeServer, *arguments: str) -> Result:
    return runner.invoke(app, ["load", "--url", server.url, *arguments], env={"COLUMNS": "160"})


def test_baseline_plays_the_same_prompts_without_the_cache_and_compares(server: FakeServer, tmp_path: Path) -> None:
    result = load(
        server, *SMALL, "--baseline", "--json", str(tmp_path / "run.json"), "--png", str(tmp_path / "run.png")
    )

    assert result.exit_code == 0, result.output
    measured = server.measured
    assert [body["messages"] for body in measured[:6]] == [body["messages"] for body in measured[6:]]
    assert [body.get("kvstore") for body in measured] == [None] * 6 + [{"cache": False}] * 6
    assert "all 6 answers are the same text" in result.stdout
    written: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    with_cache, without = written["runs"]
    assert with_cache["all"]["hit_rate"] > 0.5
    assert without["all"]["hit_rate"] == 0
    assert len(with_cache["records"]) == 6
    assert written["comparison"]["same"] == 6
    assert written["workload"]["system_tokens"] == 64
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_tiers_that_answers_do_not_tell_are_those_that_the_server_counts(server: FakeServer, tmp_path: Path) -> None:
    server.speaks_extension = False
    server.counted = [("host", 16), ("engine", 32)]

    result = load(server, *SMALL, "--json", str(tmp_path / "run.json"))

    assert result.exit_code == 0, result.output
    assert "hits by tier, as the servers counted: host 96, engine 192" in result.stdout
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["runs"][0]["counted_hit_tokens"] == {"host": 96, "engine": 192}


def test_conversations_are_compared_prompt_by_prompt(server: FakeServer) -> None:
    wrong = {"number": -1}

    def behave(number: int, body: dict[str, Any]) -> Behaviour:
        if len(server.measured) == 1 and "kvstore" in body:
            wrong["number"] = number
            return Behaviour(pieces=[" another", " text"])
        return Behaviour()

    server.behave = behave
    arguments = ["-w", "multi-round", "--users", "1", "--rounds", "3", "--system-tokens", "40", "-c", "1"]

    result = load(server, *arguments, "--history-tokens", "0", "--baseline")

    assert wrong["number"] >= 0
    assert result.exit_code == 1
    assert "1 of 3 answers are NOT the same text" in result.stdout, "one different answer counts once"


def test_another_server_can_be_the_baseline(server: FakeServer) -> None:
    server.speaks_extension = False

    result = load(server, *SMALL, "--plain", "--baseline-url", server.url)

    assert result.exit_code == 0, result.output
    assert all("kvstore" not in body for body in server.bodies)
    assert "with and without the cache" in result.stdout


def test_server_that_ignores_cache_false_is_warned_of(server: FakeServer) -> None:
    server.obeys_cache_false = False

    result = load(server, *SMALL, "--baseline")

    assert "does not know" in result.stdout
    assert "--baseline-url" in result.stdout


def test_open_loop_tells_its_own_lateness(server: FakeServer) -> None:
    result = load(server, *SMALL, "--rate", "100")

    assert result.exit_code == 0, result.output
    assert "sent late by this program" in result.stdout


def test_trace_is_played_at_its_own_times_as_token_ids(server: FakeServer, tmp_path: Path) -> None:
    header = {"format": "kvt1", "block_tokens": 16}
    lines = [
        {"t": n / 10, "s": -1, "in": 50, "out": 5, "p": n - 1, "k": 3 * (n > 0), "h": [[n * 9, 3]]} for n in range(3)
    ]
    trace = tmp_path / "made.kvt"
    trace.write_text("\n".join(json.dumps(line) for line in (header, *lines)))

    result = load(server, "-w", "trace", "--trace", str(trace), "--trace-times", "--speedup", "2", "--warmup", "0")

    assert result.exit_code == 0, result.output
    assert [len(body["prompt"]) for body in server.bodies] == [50] * 3
    assert "from host" in result.stdout


def test_failed_requests_are_told_and_end_with_one(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(500) if number == 5 else Behaviour()

    result = load(server, *SMALL)

    assert result.exit_code == 1
    assert "1 x HTTP 500, e.g. request 1 (replica-0): no: 500" in result.stdout


def test_refusals_are_no_failure(server: FakeServer) -> None:
    server.behave = lambda number, body: Behaviour(429, "queue_full") if number == 5 else Behaviour()

    result = load(server, *SMALL, "--on-refusal", "count")

    assert result.exit_code == 0
    assert "1 queue_full; 1 requests stayed refused" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-w", "shared"], "'shared' is unknown; it is one of shared-prompt, multi-round, long-doc, no-reuse, trace"),
        (["--rate", "1", "--concurrency", "2"], "--concurrency and --rate exclude each other"),
        (["--rate", "0"], "rate = 0.0"),
        (["--concurrency", "0"], "concurrency = 0"),
        (["--documents", "3"], "--documents means nothing to workload shared-prompt; it takes --requests"),
        (["--requests", "0"], "requests = 0 is too small"),
        (["-w", "trace"], "needs --trace FILE"),
        (["--trace", "x.kvt"], "--trace means nothing to shared-prompt"),
        (["-w", "trace", "--trace", "not-there.kvt.zst"], "not-there.kvt.zst: No such file"),
        (["--trace-times"], "no times of its own"),
        (["--speedup", "2"], "--speedup is for --trace-times"),
        (["--on-refusal", "panic"], "retry or count"),
        (["--api", "soap"], "chat or completions"),
        (["--plain", "--tenant", "acme"], "--tenant is not in OpenAI's API"),
        (["--seed", "-1"], "--seed -1 is too small"),
        (["--timeout", "0"], "--timeout 0"),
        (["--json", "not/there/run.json"], "make it first"),
    ],
)
def test_wrong_option_is_told_with_what_would_be_right(server: FakeServer, arguments: list[str], told: str) -> None:
    result = load(server, *arguments)

    assert result.exit_code == 2
    assert told in result.stderr
    assert server.bodies == [], "nothing was asked"


def test_server_that_is_not_there_is_told_with_the_next_step() -> None:
    result = runner.invoke(app, ["load", "--url", "http://127.0.0.1:9"])

    assert result.exit_code == 2
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "kvstore cluster up" in result.stderr


def test_help_lists_workloads_with_their_defaults_and_examples() -> None:
    result = runner.invoke(app, ["load", "--help"], env={"COLUMNS": "100"})

    assert result.exit_code == 0
    text = result.stdout.replace("\u00a0", " ")
    for part in ("multi-round:", "--users 4", "--order tile", "--block-tokens 0", "kvstore load -w trace --trace"):
        assert part in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_prints_what_there_is_so_far(server: FakeServer, tmp_path: Path) -> None:
    server.behave = lambda number, body: Behaviour(first_s=0.0 if len(server.measured) <= 3 else 60)
    arguments = ["--url", server.url, *SMALL, "-c", "1", "--json", str(tmp_path / "run.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "load", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    try:
        wait_until(lambda: len(server.measured) >= 4)

        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130, stderr
    assert "3 of 3 requests answered" in stdout
    assert "interrupted" in stdout
    assert "Traceback" not in stderr
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"][0]["records"]) == 3
