from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvstore.llamacpp.folder import LOCK, PREFIX, SlotsFolder

HOLD = """
import sys
from pathlib import Path
from kvstore.llamacpp.folder import SlotsFolder
print(SlotsFolder((Path(sys.argv[1]),)).path, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_process_that_was_killed_is_removed_by_the_next_and_no_other(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}no-lock-yet").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        (left / "kvstore-1-1.bin").write_bytes(b"state")

        beside = SlotsFolder((tmp_path,))
        assert left.is_dir()
        process.kill()
        process.wait()
        after = SlotsFolder((tmp_path,))

    assert not left.exists()
    assert beside.path.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        (beside.path.name, after.path.name, "elsewhere", f"{PREFIX}link", f"{PREFIX}no-lock-yet")
    )
    assert (elsewhere / LOCK).exists()
    for folder in (beside, after):
        folder.remove()
        folder.remove()
        assert not folder.path.exists()
