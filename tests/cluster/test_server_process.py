from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvstore.cluster import server_process
from kvstore.cluster.server_process import ServerProcess, as_child
from kvstore.errors import KVStoreError
from kvstore.ports import free_port
from tests.helpers.waiting import wait_until

# Never up; has a child in a session of its own; does not end by SIGTERM.
STUBBORN = """
import signal, subprocess, sys, pathlib
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
note = pathlib.Path(sys.argv[1])
note.with_suffix(".new").write_text(str(child.pid))
note.with_suffix(".new").rename(note)
child.wait()
"""
START = """
import sys
from pathlib import Path
from kvstore.cluster.server_process import ServerProcess
with ServerProcess("engine", ["sleep", "600"], "http://127.0.0.1:1", Path(sys.argv[1])):
    pass
"""

GUARDED = """
import sys
from pathlib import Path
from kvstore.cluster.server_process import ServerProcess
guard = "import sys; from kvstore.cluster.guard import guard; sys.exit(guard(sys.argv[1:], 0.2))"
command = [sys.executable, "-c", guard, sys.executable, "-c", sys.argv[1], sys.argv[2]]
ServerProcess("engine", command, "http://127.0.0.1:1", Path(sys.argv[3])).start()
"""


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def server(tmp_path: Path, *command: str) -> ServerProcess:
    return ServerProcess("engine", command, f"http://127.0.0.1:{free_port()}", tmp_path / "log")


def test_one_that_hangs_is_killed_with_all_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "STOP_TIMEOUT_S", 0.2)
    note = tmp_path / "pid"
    hanging = server(tmp_path, *as_child([sys.executable, "-c", STUBBORN, str(note)]))
    with pytest.raises(KVStoreError, match="engine is not ready after 0 s"):
        hanging.start(timeout_s=0.0)
    wait_until(note.exists)

    hanging.stop()

    wait_until(lambda: is_gone(int(note.read_text())))


def test_a_signal_in_the_middle_of_the_start_ends_what_was_started(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", START, str(tmp_path / "log")]) as front:
        found = psutil.Process(front.pid)
        wait_until(lambda: bool(found.children()))
        (child,) = found.children()

        front.send_signal(signal.SIGTERM)

    assert front.returncode == 128 + signal.SIGTERM
    wait_until(lambda: is_gone(child.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells of a parent's end")
def test_one_that_hangs_when_its_front_is_killed_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", GUARDED, STUBBORN, str(note), str(tmp_path / "log")]) as front:
        wait_until(note.exists)
        started = psutil.Process(front.pid).children(recursive=True)
        assert len(started) == 3  # the guard, the server, its child

        front.kill()

    for one in started:
        wait_until(lambda pid=one.pid: is_gone(pid))  # type: ignore[misc]


def test_a_ctrl_c_is_for_the_front(tmp_path: Path) -> None:
    guarded = server(tmp_path, *as_child(["sleep", "600"]))
    with pytest.raises(KVStoreError, match="not ready"):
        guarded.start(timeout_s=0.0)
    assert guarded._process is not None
    found = psutil.Process(guarded._process.pid)
    wait_until(lambda: bool(found.children()))

    groups = {os.getpgid(one.pid) for one in (found, *found.children())}
    guarded.stop()

    assert groups == {found.pid}


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_the_guard_ends_as_its_program_did(script: str, code: int) -> None:
    assert subprocess.run(as_child(["/bin/sh", "-c", script]), check=False).returncode == code


def test_the_first_cause_is_told_where_others_have_followed_it(tmp_path: Path) -> None:
    script = (
        "echo 'Traceback (most recent call last):'; echo '(Core pid=7) ERROR [core.py:1] ConfigError: no daemon there';"
        "for n in $(seq 200); do echo 'and so on'; done; echo 'RuntimeError: see root cause above'; exit 3"
    )

    with pytest.raises(KVStoreError) as told:
        server(tmp_path, "/bin/sh", "-c", script).start()

    assert str(told.value).startswith("engine has ended with 3; it says: ConfigError: no daemon there; its log ends: ")
    assert str(told.value).endswith("RuntimeError: see root cause above")


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(KVStoreError, match="/no/such: No such file or directory; give the path of a program"):
        server(tmp_path, *as_child(["/no/such"])).start()
