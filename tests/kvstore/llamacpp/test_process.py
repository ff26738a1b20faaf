from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cluster import server_process
from kvstore.errors import KVStoreError
from kvstore.llamacpp.folder import MEMORY_FOLDER, remove_left
from kvstore.llamacpp.process import LlamaProcess, LlamaSettings
from tests.helpers.waiting import wait_until

START = """
import sys
from pathlib import Path
from kvstore.llamacpp.process import LlamaProcess, LlamaSettings
LlamaProcess(LlamaSettings(Path("model.gguf"), sys.argv[1]), 1).start()
"""


def program(path: Path, script: str) -> str:
    """A program that is no llama-server."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_program_that_we_started_ends_when_we_are_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    path = program(tmp_path / "server", f"echo $$ > {note}.new; mv {note}.new {note}; exec sleep 600")
    with subprocess.Popen([sys.executable, "-c", START, path], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        wait_until(note.exists)
        pid = int(note.read_text())
        assert is_alive(pid)

        process.kill()

    wait_until(lambda: not is_alive(pid))
    remove_left(MEMORY_FOLDER)


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    path = program(tmp_path / "server", "echo 'no such model'; exit 3")

    with pytest.raises(KVStoreError, match="ended with 3; its log ends: no such model"):
        LlamaProcess(LlamaSettings(tmp_path / "model.gguf", path), 1).__enter__()


def test_a_log_that_has_grown_large_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "MAX_LOG_BYTES", 10)
    llama = LlamaProcess(LlamaSettings(tmp_path / "model.gguf"), 1)
    log = llama.folder / "llama-server.log"
    log.write_bytes(b"a" * 11)

    assert llama.ended() == ""

    assert log.stat().st_size == 0
    llama.stop()
    assert not llama.folder.exists()
