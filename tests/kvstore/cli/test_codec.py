"""`kvstore codec check`: sentences for what is missing, and the exit code of a missed gate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.lab import quality
from kvstore.lab.quality import Quality, QualityReport


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["codec", "check", *arguments])


def test_a_gate_without_a_model_is_a_sentence() -> None:
    result = run()

    assert result.exit_code not in (0, 1)
    assert "--model is missing: what a codec costs can only be told of a model" in result.output


@pytest.mark.parametrize("name", ["nowhere", "weights.bin"])
def test_what_is_no_model_is_a_sentence(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "weights.bin").touch()

    result = run("--model", str(tmp_path / name))

    assert result.exit_code not in (0, 1)
    assert "it must be a directory with a config.json, or a .gguf file" in " ".join(result.output.split())


@pytest.mark.parametrize(("kl", "exit_code"), [(1.9e-4, 0), (2.1e-4, 1)])
def test_a_missed_gate_is_told_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kl: float, exit_code: int
) -> None:
    rows = Quality("exact", 1.0, 0.0, 1.0, 0.0, 6, None), Quality("near", 1.94, kl, 0.99, 0.013, 6, 2e-4)
    report = QualityReport("model", 1e-3, 0.98, 2, 384, 6, rows)
    monkeypatch.setattr(quality, "load_model", lambda path: (None, None))
    monkeypatch.setattr(quality, "check", lambda *given, **named: report)

    result = run("--model", str(tmp_path))
    told = json.loads(run("--model", str(tmp_path), "--json").stdout)

    assert result.exit_code == exit_code
    assert ("MISSES ITS GATE" in result.stdout) == bool(exit_code)
    assert [row["passes"] for row in told["codecs"]] == [True, not exit_code]


def test_a_needle_is_told_once_in_a_prompt_of_whole_blocks() -> None:
    """What is told again in a last block that is not whole, and so never coded, is found by every codec."""
    told = quality.needle_prompt(
        lambda text, **_: SimpleNamespace(input_ids=np.array([list(text)])), "Rome", 4321, "x" * 999
    )

    assert told.shape == (1, quality.PREFIX)
    assert quality.PREFIX % quality.BLOCK == 0
    assert "".join(told[0]).count("4321") == 1
