from __future__ import annotations

import os
from pathlib import Path

from kvstore.llamacpp.server import LEFT_S, LlamaServer


def test_files_left_behind_are_removed_and_those_of_others_are_not(tmp_path: Path) -> None:
    ours, beside, dead = (LlamaServer("http://127.0.0.1:1", tmp_path) for _ in range(3))
    late, used, left, foreign = ours.new_file(), beside.new_file(), dead.new_file(), tmp_path / "session.bin"
    for path in (late, used, left, foreign):
        path.write_bytes(b"state")
    for path in (left, foreign):
        old = path.stat().st_mtime - LEFT_S - 60
        os.utime(path, (old, old))

    ours.remove_left()

    assert sorted(tmp_path.iterdir()) == sorted((used, foreign))
