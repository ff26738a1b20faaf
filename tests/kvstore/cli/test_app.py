from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli import inspect as inspect_command
from kvstore.cli.app import app
from kvstore.errors import TierUnavailable
from kvstore.lab.machine import package_version
from tests.helpers.page_directory import flip_bit, make_directory
from tests.helpers.waiting import WAIT_S

ROOT = Path(__file__).resolve().parents[3]
runner = CliRunner()


def kvstore(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("KVSTORE_")}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "kvstore", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=WAIT_S)


def test_help_names_every_command_and_says_where_to_begin() -> None:
    result = runner.invoke(app, ["--help"])

    assert result.exit_code == 0
    for command in ("demo", "config", "inspect", "verify", "bench"):
        assert result.stdout.count(f"│ {command} ") == 1, "every command once"
    assert "First steps" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


@pytest.mark.parametrize("command", ["config", "inspect", "verify", "bench"])
def test_every_command_has_help(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])

    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_without_a_command_there_is_help() -> None:
    result = runner.invoke(app, [])

    assert "First steps" in result.output


def test_unknown_command_is_refused_with_what_was_meant() -> None:
    result = runner.invoke(app, ["inspct"])

    assert result.exit_code == 2
    assert "inspect" in result.output


def test_version_is_the_package_version_and_says_which_twins_are_at_work() -> None:
    result = runner.invoke(app, ["--version"])

    assert result.exit_code == 0
    twins = ", ".join(f"{what} in (C|Python)" for what in ("hashing", "ordering", "learning", "copying", "sweeping"))
    assert re.fullmatch(rf"kvstore {re.escape(package_version())} \({twins}\)\n", result.stdout)


def test_tables_in_a_pipe_end_where_their_text_ends(tmp_path: Path) -> None:
    done = kvstore("config", cwd=tmp_path)

    assert done.returncode == 0
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def break_inspect(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(path: Path) -> None:
        raise error

    monkeypatch.setattr(inspect_command, "check_directory", broken)


def test_error_of_ours_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    break_inspect(monkeypatch, TierUnavailable("disk tier: gone [fishing]"))

    result = runner.invoke(app, ["inspect", "x"])

    assert result.exit_code == 2
    assert result.stderr == "kvstore: disk tier: gone [fishing]\n"
    assert result.stdout == ""


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    error = TierUnavailable("disk tier: gone")
    break_inspect(monkeypatch, error)

    assert runner.invoke(app, ["--debug", "inspect", "x"]).exception is error


def test_error_about_a_file_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    break_inspect(monkeypatch, PermissionError(13, "Permission denied", "/data/index"))

    result = runner.invoke(app, ["inspect", "x"])

    assert result.exit_code == 2
    assert result.stderr == "kvstore: /data/index: Permission denied\n"


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("nothing in particular")
    break_inspect(monkeypatch, error)

    assert runner.invoke(app, ["inspect", "x"]).exception is error


def test_real_command_verifies_a_directory_with_a_bad_page(tmp_path: Path) -> None:
    make_directory(tmp_path / "pages", "a b c")
    flip_bit(tmp_path / "pages", 0)

    done = kvstore("verify", "pages", cwd=tmp_path)

    assert done.returncode == 1
    assert "does not fit its checksum" in done.stdout
    assert done.stderr == ""


def test_real_command_tells_errors_without_traceback(tmp_path: Path) -> None:
    done = kvstore("inspect", "nowhere", cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvstore: nowhere does not exist;")
    assert done.stderr.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "lmdb", "redis", "pydantic", "prometheus_client", "matplotlib", "xxhash"}
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kvstore.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"print(sorted({heavy!r} & set(sys.modules)))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)

    assert done.stdout.strip() == "[]", done.stderr
