"""How much memory a process may still take: the least of what the machine, its groups and its own limits leave."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from kvstore.limits import group_folders

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping, being slowed down or killed, as far as the kernel tells."""
    return min(
        [_machine_available(proc / "meminfo"), *_group_limits(proc, cgroups), *_process_limits(proc / "self/status")]
    )


def _machine_available(meminfo: Path) -> int:
    try:
        return _field(meminfo, "MemAvailable:") * 1024 or _NO_LIMIT
    except (OSError, ValueError, IndexError):
        return _NO_LIMIT


def _group_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The memory left in every group from this process's own up to the root; v2 and v1 have different file names."""
    for folder, is_v2 in group_folders("memory", proc, cgroups):
        # Above memory.high a group is slowed down until it hardly moves: nothing that a cache may bring about.
        limits = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
        usage_name = "memory.current" if is_v2 else "memory.usage_in_bytes"
        for limit_name in limits:
            try:
                limit = int((folder / limit_name).read_text())  # "max" is no number: no limit here
                usage = int((folder / usage_name).read_text())
                reclaimable = _field(folder / "memory.stat", "inactive_file" if is_v2 else "total_inactive_file")
            except (OSError, ValueError, IndexError):
                continue
            if limit < _NO_LIMIT:
                yield max(0, limit - usage + reclaimable)


def _process_limits(status: Path) -> Iterator[int]:
    """The memory that ulimit -v and ulimit -d leave."""
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            try:
                yield max(0, soft - _field(status, name) * 1024)
            except (OSError, ValueError, IndexError):
                continue


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            key, value, *_ = line.split()
            if key == name:
                return int(value)
    return 0
