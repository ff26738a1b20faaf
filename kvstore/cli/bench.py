"""`kvstore bench`: run workloads and compare each with what the machine could do at best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.console import add_row, console, print_json, table
from kvstore.errors import ConfigError
from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvstore.lab.bench import Table


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD [ARGUMENT]]...", help="What to run; without any, the list of what there is."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: a first impression.")] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Measure other ways, too: files, redis-py.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with machine and versions.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure this machine: each workload beside its ceiling, taking turns.

    For example: kvstore bench hash planner host disk /mnt/nvme redis local
    """
    from kvstore.lab.bench import WORKLOADS, report, run

    if not workloads:
        listing = table("workload", "needs", "what it measures")
        for name, workload in WORKLOADS.items():
            add_row(listing, name, workload.argument, workload.summary)
        console().print(listing)
        return
    results = {}
    progress = console(stderr=True)
    for name, argument in parse_plan(workloads, {name: workload.argument for name, workload in WORKLOADS.items()}):
        with progress.status(f"{name}: {WORKLOADS[name].summary}"):
            results[name] = run(name, argument, quick=quick, peer=peer)
        if not as_json:
            for measured in results[name]:
                console().print(_as_table(name, measured))
    if out is not None:
        out.write_text(json.dumps(report(results), indent=2) + "\n")
    if as_json:
        print_json(report(results))


def parse_plan(words: Sequence[str], needs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Read `hash disk DIR` as [("hash", ""), ("disk", "DIR")], before anything runs.

    needs: workload -> what it must be given, "" for nothing.

    Raises ConfigError for an unknown workload or a missing argument.
    """
    plan: list[tuple[str, str]] = []
    rest = iter(words)
    for word in rest:
        if word not in needs:
            raise ConfigError(f"workload {word!r} is unknown; known are {', '.join(needs)}")
        argument = next(rest, "") if needs[word] else ""
        if needs[word] and (not argument or argument in needs):
            raise ConfigError(f"workload {word} needs {needs[word]}; write kvstore bench {word} {needs[word]}")
        plan.append((word, argument))
    return plan


def _as_table(workload: str, measured: Table) -> object:
    is_bytes = measured.unit == "bytes"
    has_partner = any(timing.partner_cpu_s is not None for timing in measured.timings)
    each = "time" if is_bytes else f"µs/{measured.unit.rstrip('s')}"
    numbers = (
        f"{measured.unit}/s",
        "of ceiling",
        each,
        "CPU s",
        "of ceiling's CPU",
        *(["daemon's CPU s"] if has_partner else []),
    )
    output = table("case", *numbers, title=f"{workload}: {measured.name}", right=numbers)
    for timing in measured.timings:
        add_row(
            output,
            timing.name,
            f"{format_bytes(timing.per_s)}/s" if is_bytes else f"{timing.per_s:,.0f}",
            f"{timing.ratio:.2f}",
            format_seconds(timing.median_s) if is_bytes else f"{timing.median_s / timing.amount * 1e6:.3g}",
            f"{timing.cpu_s:.4f}",
            f"{timing.cpu_ratio:.2f}",
            *(["" if timing.partner_cpu_s is None else f"{timing.partner_cpu_s:.4f}"] if has_partner else []),
        )
    return output
