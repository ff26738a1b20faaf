"""How much memory a process may still take: the smaller of what the machine and what its control group have left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping or being killed, as far as the kernel tells."""
    return min([_machine_available(proc / "meminfo"), *_group_limits(proc / "self/cgroup", cgroups)])


def _machine_available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return _NO_LIMIT


def _group_limits(membership: Path, cgroups: Path) -> Iterator[int]:
    """What is left in every group from this process's own up to the root; v2 and v1 have different file names."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            yield from _left(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _left(
                cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )


def _left(root: Path, path: str, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    group = root / path.strip("/")
    # Inside a container the path may be the host's, which is not mounted here; then only the root shows our limits.
    groups = [group, *group.parents] if group.is_dir() else [root]
    for folder in groups:
        try:
            limit = int((folder / limit_name).read_text())  # "max" is no number: no limit here
            usage = int((folder / usage_name).read_text())
            reclaimable = _field(folder / "memory.stat", reclaimable_name)
        except (OSError, ValueError):
            limit = _NO_LIMIT
        if limit < _NO_LIMIT:
            yield max(0, limit - usage + reclaimable)
        if folder == root:
            return


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
