"""The machine and the versions a measurement was made with, for whoever reads it later."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from kvstore.limits import usable_cpus
from kvstore.units import KiB

DISTRIBUTION = "kvtiers"
_LIBRARIES = ("numpy", "xxhash", "lmdb", "redis", "torch", "transformers")


def package_version() -> str:
    """The version of this package; "0+source" where it runs from a source tree that was never installed."""
    return _version(DISTRIBUTION) or "0+source"


def machine() -> dict[str, object]:
    """Processor, cores this process may use, memory, load and kernel, as plain numbers and text."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "native": native(),
        "load_average_1min": os.getloadavg()[0],
        "system": platform.platform(),
    }


def native() -> dict[str, bool]:
    """Which of the optional C extensions are at work; where one is not, its Python twin does the same, slower."""
    names = {
        "hashing": "radix._chain",
        "ordering": "radix._ordered",
        "learning": "eviction._visits",
        "copying": "kvstore.devices._copy",
        "sweeping": "kvstore.lab._sweep",
    }
    return {what: find_spec(name) is not None for what, name in names.items()}


def versions() -> dict[str, str]:
    """Python, this package and the libraries that move bytes; only what is installed."""
    found = {"python": sys.version.split()[0], DISTRIBUTION: package_version()}
    for name in _LIBRARIES:
        version = _version(name)
        if version is not None:
            found[name] = version
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    total = _proc_field("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * KiB if total else None


def _proc_field(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None
