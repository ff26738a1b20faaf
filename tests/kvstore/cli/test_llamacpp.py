"""`kvstore llamacpp` with options that cannot be: a sentence with the fix, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cluster import programs

URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ([], "--model FILE"),
        (["--model", "{folder}/none.gguf"], "no such file"),
        (["--model", "{folder}/file"], "no GGUF file"),
        (["--model", "{folder}/file", "--slots", "{folder}"], "--url URL"),
        (["--model", "{folder}/model.gguf"], "pip install"),
        (["--model", "{folder}/model.gguf", "--", "--n-gpu-layers", "9"], "--server PATH"),
        (["--model", "{folder}/model.gguf", "--server", "none"], "no such program"),
        (["--url", URL], "--slots DIR"),
        (["--url", URL, "--slots", "{folder}/none"], "--slot-save-path"),
        (["--url", "127.0.0.1:8081", "--slots", "{folder}"], "http://"),
        (["--url", URL, "--slots", "{folder}", "--server", "llama-server"], "give one"),
        (["--url", URL, "--slots", "{folder}", "--", "--n-gpu-layers", "9"], "give one"),
    ],
)
def test_options_that_cannot_be_are_told_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fix: str
) -> None:
    (tmp_path / "file").write_bytes(b"{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))

    result = CliRunner().invoke(app, ["llamacpp", *(one.format(folder=tmp_path) for one in arguments)])

    assert result.exit_code == 2
    assert fix in " ".join(result.output.split())
