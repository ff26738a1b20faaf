"""What `kvstore vllm` says where it cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvstore.cli.app import app

URL = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_VENV", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["vllm", "--port", "0", *arguments])


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ([], "--model"),
        (["--model", "m"], "make test-vllm"),
        (["--model", "m", "--server", "/no/such"], "there is no such program; give the path of vllm"),
        (["--model", "m", "--set", "host.capacity=1GiB"], "did you mean host.capacity_bytes?"),
        (["--url", "127.0.0.1:8000"], "it must begin with http://"),
        (["--url", URL, "--model", "m"], "give one"),
        (["--url", URL, "--", "--max-model-len", "9"], "give one"),
        (["--url", URL], "vLLM at http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_options_that_cannot_be_are_told_with_the_fix(arguments: list[str], fix: str) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    assert fix in " ".join(result.output.split())


def test_an_engine_that_does_not_come_up_is_told_with_its_cause_and_the_end_of_its_log(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'lmdb'\"\nexit 1\n")
    program.chmod(0o700)
    log = tmp_path / "engine.log"

    result = run("--model", "m", "--server", str(program), "--engine-log", str(log))

    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert "vLLM has ended with 1; its log ends: ModuleNotFoundError: No module named 'lmdb'" in told
    assert f"if a module is missing, install this package in the environment of {program}" in told
    assert log.read_text().startswith("ModuleNotFoundError")
