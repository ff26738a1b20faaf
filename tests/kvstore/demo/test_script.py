"""The demo, whole, with a tiny model in real processes; and its edges without any process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.demo import script as demo_module
from kvstore.demo.random_model import Shape, make_random_model
from kvstore.demo.report import Stage
from kvstore.testing.redis_server import BINARY_VARIABLE
from tests.helpers.demo import answer, report, turn

runner = CliRunner()


class PretendPlay:
    """Plays nothing and tells made-up results."""

    played: tuple[Stage, ...] = report().stages

    def __init__(self, spec: Any, *_: Any) -> None:
        self.spec = spec

    def stages(self) -> list[Stage]:
        return [stage for stage in self.played if stage.name != "redis" or self.spec.redis_url]

    def close(self) -> None:
        pass


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments of a demo that plays nothing."""
    monkeypatch.setattr(demo_module, "Play", PretendPlay)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ["demo", "--model", str(tmp_path / "model"), "--png", str(tmp_path / "demo.png")]


@pytest.mark.parametrize(("is_terminal", "is_cut"), [(False, False), (True, True)])
def test_a_log_has_the_whole_answer_and_a_terminal_one_line(is_terminal: bool, is_cut: bool) -> None:
    file = io.StringIO()
    words = "The Petrel takes cars. " * 10

    with demo_module.Narrator(Console(file=file, width=100, force_terminal=is_terminal)).step("cold") as step:
        step.note(words)

    shown = file.getvalue().rstrip("\n").rpartition("\n")[2]
    assert (words.strip() not in shown, "\N{HORIZONTAL ELLIPSIS}" in shown) == (is_cut, is_cut)


@pytest.mark.redis
@pytest.mark.timeout(600)  # three processes that import torch; half a minute on a quiet machine
def test_every_stage_is_served_from_where_it_should_be_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "MAX_THREADS", 1)  # two threads are slower for so small a model
    (tmp_path / "model").mkdir()
    make_random_model(tmp_path / "model", Shape(hidden=64, layers=2, heads=4, kv_heads=2, mlp=64, positions=4096))
    out, png, disk = tmp_path / "out.json", tmp_path / "demo.png", tmp_path / "disk"
    arguments = ["--model", str(tmp_path / "model"), "--json", str(out), "--png", str(png), "--directory", str(disk)]
    arguments += ["--prompt-tokens", "512", "--dtype", "float32", "--explain", "--redis"]

    result = runner.invoke(app, ["demo", *arguments])

    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert list(stages) == ["cold", "host", "disk", "redis", "conversation", "fork"]
    assert record["identical"] is True
    assert all(stage["identical"] for stage in stages.values())
    assert stages["cold"]["reused"] == {"host": 0, "disk": 0, "redis": 0}
    whole = stages["cold"]["prompt_tokens"] // demo_module.PREFILL_CHUNK * demo_module.PREFILL_CHUNK
    for tier in ("host", "disk", "redis"):
        assert stages[tier]["reused"] == {"host": 0, "disk": 0, "redis": 0, tier: whole}
    assert stages["conversation"]["reused"]["host"] >= whole
    assert 0 < stages["fork"]["reused"]["host"] < whole
    assert record["explain"]["kv_heads"] == 2
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (disk / "slab").exists() or any(disk.iterdir())


def test_other_tokens_end_the_demo_with_one(pretend: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Stage("host", (replace(turn(0.5), reference=answer(4.0, tokens=(7,))),))
    monkeypatch.setattr(PretendPlay, "played", (report().stages[0], wrong))

    result = runner.invoke(app, [*pretend, "--no-redis"])

    assert result.exit_code == 1
    assert "NOT the same" in result.output


def test_without_a_redis_server_the_stage_is_left_out_and_told_how_to_get_it(
    pretend: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "/no/such/redis-server")

    result = runner.invoke(app, pretend)

    assert result.exit_code == 0, result.output
    assert "The Redis stage is left out" in result.output
    assert "apt-get install redis-server" in " ".join(result.output.split())
    assert "second replica" not in result.output


def test_redis_that_was_asked_for_and_is_not_there_is_an_error(
    pretend: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "/no/such/redis-server")

    assert runner.invoke(app, [*pretend, "--redis"]).exit_code == 2


def test_a_directory_with_something_in_it_is_refused(pretend: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, [*pretend, "--directory", str(tmp_path)])

    assert result.exit_code == 2
    assert "must be new or empty" in result.stderr


def test_a_prompt_too_short_to_share_is_refused(pretend: list[str]) -> None:
    result = runner.invoke(app, [*pretend, "--prompt-tokens", "100"])

    assert result.exit_code == 2
    assert "prompt-tokens" in result.output


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    assert demo_module._one_line("a\x1b[2Jb\n\n c\x07") == "a [2Jb c"


def test_sigterm_unwinds_so_that_nothing_is_left_behind(tmp_path: Path) -> None:
    code = (
        "import tempfile, time\n"
        "from kvstore.demo.script import unwound_by_sigterm\n"
        f"with unwound_by_sigterm(), tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir())

        process.terminate()

        assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []
