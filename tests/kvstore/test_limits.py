"""What a container lets a process have is seen, and told with its number."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.limits import group_folders, thread_limit, usable_cpus
from kvstore.tiers.memory_limit import available_memory

ROOT = Path(__file__).parents[2]
GiB = 1 << 30


def lay_out(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with these contents."""
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(membership)
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    return proc, cgroups


class TestCpus:
    @pytest.mark.parametrize(
        ("quota", "cpus"),
        [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("garbage", 4)],
    )
    def test_the_quota_of_the_group_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})

        assert usable_cpus(*lay_out(tmp_path, "0::/\n", {"cpu.max": quota + "\n"})) == cpus

    def test_the_quota_of_an_outer_group_counts_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
        files = {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "max 100000"}

        assert usable_cpus(*lay_out(tmp_path, "0::/pod/one\n", files)) == 3

    def test_the_first_version_of_control_groups_is_read_under_either_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
        files = {"cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}

        # A path of the host, which is not mounted in the container.
        assert usable_cpus(*lay_out(tmp_path, "4:cpu,cpuacct:/docker/0123\n", files)) == 3

    def test_no_quota_is_no_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        files = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}

        assert usable_cpus(*lay_out(tmp_path, "4:cpu:/\n", files)) == 8
        assert usable_cpus(tmp_path / "no proc", tmp_path / "no groups") == 8


class TestMemory:
    def test_a_group_that_is_slowed_down_is_as_good_as_full(self, tmp_path: Path) -> None:
        files = {"memory.max": "max", "memory.high": str(2 * GiB), "memory.current": str(GiB), "memory.stat": "x 1\n"}
        proc, cgroups = lay_out(tmp_path, "0::/\n", files)
        (proc / "meminfo").write_text("MemAvailable: 99999999 kB\n")

        assert available_memory(proc, cgroups) == GiB

    def test_limits_of_the_process_itself_count(self) -> None:
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
            "from kvstore.tiers.memory_limit import available_memory; print(available_memory() < 2 << 30)\n"
            "from kvstore.tiers.host import HostSlab; HostSlab(1 << 20, 4096)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

        assert done.stdout == "True\n"
        assert "ConfigError: host.capacity_bytes is 4294967296" in done.stderr


@pytest.fixture
def pids_group() -> Iterator[Path]:
    """A control group of our own that limits processes and threads."""
    parents = [folder for folder, _ in group_folders("pids") if (folder / "cgroup.procs").exists()]
    group = parents[-1] / f"kvstore-test-{os.getpid()}" if parents else Path("/none")
    try:
        group.mkdir()
        (group / "pids.max").write_text("2")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control groups can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


class TestThreads:
    def test_a_thread_too_many_is_told_with_the_limit_and_nothing_is_left(self, pids_group: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", OPEN_IN_GROUP, str(pids_group)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert "cannot be started" in done.stdout, done.stderr
        assert "may have 2 processes and threads and has 2 (pids.max" in done.stdout
        assert done.stdout.endswith("left 1 threads\n")

    def test_limits_of_the_user_are_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        limits = {resource.RLIMIT_NPROC: 77, resource.RLIMIT_AS: 1 << 30}
        monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], limits[limit]))

        told = thread_limit(tmp_path, tmp_path)

        assert "77 (ulimit -u)" in told
        assert "1073741824 bytes (ulimit -v)" in told


OPEN_IN_GROUP = """
import sys, threading
from pathlib import Path
from kvstore.errors import ConfigError
from kvstore.move.mover import Mover
from kvstore.move.lane import Lane
from kvstore.tiers.memory import MemoryTier
lane = Lane(MemoryTier(8, 8192), lambda slot: memoryview(bytearray(8192)), workers=4)
Path(sys.argv[1], "cgroup.procs").write_text("0")
try:
    Mover([lane], print, print, print)
except ConfigError as error:
    print(error)
print("left", threading.active_count(), "threads")
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_process_1_ends_at_sigterm_before_its_command_has_begun(tmp_path: Path) -> None:
    # The command waits in an import, where a large installation on a slow disk spends its first seconds.
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\nimport time\nwhile True: time.sleep(0.01)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "kvstore", "serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    os.kill(int(child), signal.SIGTERM)

    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = process.poll()
    process.kill()
    process.communicate()
    assert ended == 128 + signal.SIGTERM
