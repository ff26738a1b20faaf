"""Named workloads, each measured against a ceiling in the same run.

A wall time alone says more about the neighbours on a machine than about the code, so every workload is a table of cases
whose first one is the ceiling (memcpy, raw O_DIRECT, a bare socket). The cases take turns, round after round; a case's
ratio is the median over rounds of its speed over the ceiling's. CPU seconds are those of this process, all threads
together, and of the one other process that a case may work with.

A workload is a module with `run(argument, quick) -> list[Table]`; adding one is one line in `WORKLOADS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import median
from typing import Any

from kvstore.errors import ConfigError
from kvstore.lab.machine import machine, versions

ROUNDS = 9
QUICK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    run:     does the work once.
    amount:  how much that is, in the table's unit.
    prepare: what must be done before each run, outside the time.
    partner: the process, if there is one, at the other end of a connection.
    """

    name: str
    run: Callable[[], object]
    amount: float
    prepare: Callable[[], object] | None = None
    partner: int | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """The result of a case. `ratio` and `cpu_ratio` are 1 for the ceiling, and above 1 for a faster or a cheaper case.

    cpu_s: of this process; partner_cpu_s: of the partner, None if there is none. cpu_ratio: by the CPU seconds of both.
    """

    name: str
    amount: float
    median_s: float
    cpu_s: float
    per_s: float
    ratio: float
    cpu_ratio: float
    partner_cpu_s: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Cases of one kind; the first is the ceiling. `unit` is what amounts count: "bytes", "blocks", "keys"."""

    name: str
    unit: str
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class BenchWorkload:
    """An entry of the list.

    module:   has `run(argument, quick) -> list[Table]`; imported when it runs.
    argument: what has to be named on the command line, "" for nothing.
    peer:     what it may be compared with besides its ceiling, "" for nothing; `run` then takes `peer` as well.
    """

    summary: str
    module: str
    argument: str = ""
    peer: str = ""


def _workload(module: str, summary: str, argument: str = "", peer: str = "") -> BenchWorkload:
    return BenchWorkload(summary, f"kvstore.lab.workloads.{module}", argument, peer)


WORKLOADS: dict[str, BenchWorkload] = {
    "hash": _workload("hash", "hash a prompt of 128K tokens into block hashes"),
    "codec": _workload("codec", "encode and decode pages in every codec"),
    "index": _workload("index", "prefix index and eviction policies per block, over a dict"),
    "planner": _workload("planner", "lookups, saves and evictions per block, no bytes moved"),
    "sweep": _workload("sweep", "the compiled engine of kvstore replay per block reference, over libcachesim's LRU"),
    "host": _workload("host", "save and load through a store in host memory, over memcpy"),
    "device": _workload("device", "gather and scatter of an engine's tensors, over memcpy"),
    "service": _workload("service", "calls of one and of many clients of a daemon, over a bare socket"),
    "service-bytes": _workload("service_bytes", "save and load through a daemon, over memcpy"),
    "disk": _workload("disk", "write and cold read of a disk tier, over raw O_DIRECT", "DIR", "a file for each page"),
    "redis": _workload("redis", "SET and GET of a Redis tier, over a bare socket", "URL|local", "redis-py"),
    "model": _workload("model", "a model with a store that cannot help it, over the model alone", "MODEL|default"),
}


def measure(name: str, unit: str, cases: Sequence[Case], *, quick: bool = False, rounds: int | None = None) -> Table:
    """Run the cases in turns and compare each with the first one."""
    if rounds is None:
        rounds = QUICK_ROUNDS if quick else ROUNDS
    wall: list[list[float]] = [[] for _ in cases]
    cpu: list[list[float]] = [[] for _ in cases]
    partner: list[list[float]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for index, case in enumerate(cases):
            if case.prepare is not None:
                case.prepare()
            partner_start = _cpu_seconds(case.partner)
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            case.run()
            spent = time.perf_counter() - wall_start, time.process_time() - cpu_start
            if number:  # the first round warms caches, connections and page tables
                wall[index].append(spent[0])
                cpu[index].append(spent[1])
                partner[index].append(_cpu_seconds(case.partner) - partner_start)
    ceiling_cpu = [own + other for own, other in zip(cpu[0], partner[0], strict=True)]
    timings = []
    for case, seconds, cpu_seconds, partner_seconds in zip(cases, wall, cpu, partner, strict=True):
        both = [own + other for own, other in zip(cpu_seconds, partner_seconds, strict=True)]
        timings.append(
            Timing(
                name=case.name,
                amount=case.amount,
                median_s=median(seconds),
                cpu_s=median(cpu_seconds),
                per_s=case.amount / median(seconds),
                ratio=_ratio(case.amount, seconds, cases[0].amount, wall[0]),
                cpu_ratio=_ratio(case.amount, both, cases[0].amount, ceiling_cpu),
                partner_cpu_s=None if case.partner is None else median(partner_seconds),
            )
        )
    return Table(name, unit, tuple(timings))


def _ratio(amount: float, seconds: Sequence[float], ceiling_amount: float, ceiling: Sequence[float]) -> float:
    """The median over rounds of a case's speed over the ceiling's; 1 where the clock saw nothing of it."""
    ratios = [amount * best / (own * ceiling_amount) for own, best in zip(seconds, ceiling, strict=True) if own]
    return median(ratios) if ratios else 1.0


def _cpu_seconds(pid: int | None) -> float:
    """User and system time of a process, all its threads together; 0 for none."""
    # The clock of another process, as clock_getcpuclockid(3) makes it on Linux; Python has no name for it.
    return 0.0 if pid is None else time.clock_gettime(~pid << 3 | 2)


def run(name: str, argument: str = "", *, quick: bool = False, peer: bool = False) -> list[Table]:
    """Run one workload, and beside it its peer if it has one and `peer` is set.

    Raises ConfigError for an unknown one, or one whose argument is missing.
    """
    workload = WORKLOADS.get(name)
    if workload is None:
        raise ConfigError(f"workload {name!r} is unknown; known are {', '.join(WORKLOADS)}")
    if workload.argument and not argument:
        raise ConfigError(f"workload {name} needs {workload.argument}: kvstore bench {name} {workload.argument}")
    options = {"peer": True} if peer and workload.peer else {}
    tables: list[Table] = import_module(workload.module).run(argument, quick, **options)
    return tables


def report(results: dict[str, list[Table]]) -> dict[str, Any]:
    """Results with the machine and versions, ready for JSON."""
    return {
        "machine": machine(),
        "versions": versions(),
        "workloads": {name: [asdict(table) for table in tables] for name, tables in results.items()},
    }
