"""The run of a real SGLang engine on a GPU, as far as it goes without one: its arguments, its plan, its judgement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from connectors.sglang.config import parse_backend_config
from connectors.sglang_linker.config import parse_linker_config
from tests.gpu import sglang_engine


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert sglang_engine.main([*arguments, "--dry-run"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_the_plan_has_both_seats_two_lives_each_and_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, "--tp", "2")

    assert list(plan["seats"]) == ["linker", "hicache"]
    assert plan["lives"] == [["compute", "own cache", "flushed"], ["restarted"]]
    assert plan["budget_s"] < 600
    assert "service.max_namespaces=2" in plan["daemon"]


def test_our_part_of_each_seats_configuration_is_one_that_we_take(capsys: pytest.CaptureFixture[str]) -> None:
    seats = plan_of(capsys)["seats"]

    linker = seats["linker"]["unified_cache_external_linker_config"]
    assert parse_linker_config(linker["linker_extra_config"]).store.service.url is not None
    extra = json.loads(seats["hicache"]["hicache_storage_backend_extra_config"])
    ours = {key: value for key, value in extra.items() if key != "prefetch_threshold"}  # which SGLang keeps to itself
    assert parse_backend_config(ours).store.disk.path is not None


def test_one_seat_needs_no_more_than_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, "--seat", "hicache", "--model", "/models/mine")

    assert list(plan["seats"]) == ["hicache"]
    assert plan["daemon"] is None
    assert plan["seats"]["hicache"]["model_path"] == "/models/mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "0"], "--tp is 0; at least 1 is needed"),
        (["--tokens", "100"], "--tokens is 100; at least 256 are needed"),
        (["--budget-s", "0"], "--budget-s is 0; it must be positive"),
        (["--seat", "third"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sglang_engine.main(arguments)

    assert message in capsys.readouterr().err


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    script = Path(sglang_engine.__file__)

    done = subprocess.run(
        [sys.executable, script, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout)["seats"]


def passes(**changes: Any) -> dict[str, Any]:
    one = {"ids": [[1, 2]], "logprobs": [[-1.0, -2.0]], "cached": [640], "seconds": 0.1}
    other = {**one, "logprobs": [[-1.5, -2.0]]}
    found = {"compute": {**one, "cached": [0]}, "own cache": one, "flushed": one, "restarted": one, "control": other}
    return found | changes


def test_equal_ids_and_log_probabilities_from_the_seat_are_right() -> None:
    found = sglang_engine.judge(passes())

    assert found["ok"]
    assert found["restarted"]["logprob_difference"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"flushed": {**passes()["flushed"], "ids": [[1, 3]]}},
        {"restarted": {**passes()["flushed"], "logprobs": [[-1.0, -2.0001]]}},
        {"restarted": {**passes()["flushed"], "cached": [0]}},
        {"control": passes()["own cache"]},
    ],
    ids=["another token", "another log probability", "nothing loaded", "a control that shows nothing"],
)
def test_anything_else_is_not(change: dict[str, Any]) -> None:
    assert not sglang_engine.judge(passes(**change))["ok"]
