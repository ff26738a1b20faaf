from __future__ import annotations

import sys
from types import ModuleType
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.errors import KVStoreError

runner = CliRunner()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A demo that notes its arguments in place of the real one."""
    calls: list[tuple[str, bool]] = []

    def demo(model: Annotated[str, typer.Option(help="Which model.")] = "small", explain: bool = False) -> None:
        """The real demo's help."""
        calls.append((model, explain))
        if model == "bad":
            raise KVStoreError("model bad: there is none")
        if model == "different":
            raise typer.Exit(1)

    module = ModuleType("kvstore.demo.script")
    module.demo = demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvstore.demo.script", module)
    return calls


def test_arguments_go_to_the_demo(played: list[tuple[str, bool]]) -> None:
    result = runner.invoke(app, ["demo", "--model", "big", "--explain"])

    assert result.exit_code == 0, result.output
    assert played == [("big", True)]


def test_help_is_the_demos_own(played: list[tuple[str, bool]]) -> None:
    result = runner.invoke(app, ["demo", "--help"])

    assert result.exit_code == 0
    assert "The real demo's help" in result.stdout
    assert "--model" in result.stdout
    assert played == []


def test_exit_code_of_the_demo_is_ours(played: list[tuple[str, bool]]) -> None:
    assert runner.invoke(app, ["demo", "--model", "different"]).exit_code == 1


def test_error_of_the_demo_is_one_line(played: list[tuple[str, bool]]) -> None:
    result = runner.invoke(app, ["demo", "--model", "bad"])

    assert result.exit_code == 2
    assert result.stderr == "kvstore: model bad: there is none\n"


def test_unknown_option_is_refused_by_the_demo(played: list[tuple[str, bool]]) -> None:
    result = runner.invoke(app, ["demo", "--modle", "x"])

    assert result.exit_code == 2
    assert "--modle" in result.output
    assert played == []


def test_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvstore.demo.script", None)

    result = runner.invoke(app, ["demo"])

    assert result.exit_code == 2
    assert "pip install '.[demo]'" in result.stderr
