"""The limits of a container besides memory: CPUs and threads.

A container's limits are not in what the machine shows: os.cpu_count() is the machine's, and a thread that is one too
many fails without a number. Memory is tiers/memory_limit.py.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def group_folders(controller: str, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups that `controller` may be limited in, and whether each is of v2.

    From its own group up to the root. Inside a container the path may be the host's, which is not mounted there; then
    only the root shows the limits.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        is_v2 = controllers == ""
        if not is_v2 and controller not in controllers.split(","):
            continue
        # v1 mounts controllers that belong together under both names: cpu,cpuacct and cpu.
        roots = [cgroups] if is_v2 else [cgroups / controller, cgroups / controllers]
        root = next((folder for folder in roots if folder.is_dir()), roots[0])
        group = root / path.strip("/")
        for folder in [group, *group.parents] if group.is_dir() else [root]:
            yield folder, is_v2
            if folder == root:
                break


def usable_cpus(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """CPUs that this process may use at once: those it may run on, or fewer where its time is limited; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_cpu_quota(folder, is_v2) for folder, is_v2 in group_folders("cpu", proc, cgroups)]
    return max(1, min([cpus, *(math.ceil(quota) for quota in quotas if quota)]))


def thread_limit(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> str:
    """The limits that threads of this process can meet, with their numbers, for an error's message."""
    found = []
    for folder, _ in group_folders("pids", proc, cgroups):
        try:
            limit, current = int((folder / "pids.max").read_text()), int((folder / "pids.current").read_text())
        except (OSError, ValueError):
            continue
        found.append(f"its container may have {limit} processes and threads and has {current} (pids.max, --pids-limit)")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        found.append(f"its user may have {soft} (ulimit -u)")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        found.append(f"its address space is limited to {space} bytes (ulimit -v)")
    return "; ".join(found) or "no limit of this process was found: see the machine's (kernel.threads-max)"


def _cpu_quota(folder: Path, is_v2: bool) -> float:
    """CPUs whose time a group may use; 0 where it has no limit."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(0.0, int(quota) / int(period))  # v1 has -1 for no limit; v2 has "max", which is no number
    except (OSError, ValueError, ZeroDivisionError):
        return 0.0
