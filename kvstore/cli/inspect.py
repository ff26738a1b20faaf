"""`kvstore inspect DIR`: what a disk tier's directory holds. Reads the index only, also while others use it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.directory import Directory, check_directory
from kvstore.console import add_row, console, print_json, table
from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.cli.prefixes import Trunk

BAR_WIDTH = 30


def inspect(
    directory: Directory,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the biggest prefixes to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a disk tier holds: geometry, pages, bytes, ages, depths, the biggest prefixes, and what its store's
    policies have learned.

    Nothing is changed, and other processes may use the directory meanwhile.
    """
    from kvstore.cli.policies_view import learned_in, policy_table
    from kvstore.tiers.disk.report import describe

    check_directory(directory)
    facts = describe(directory)
    trunks = _trunks(directory, facts)
    policies = learned_in(directory)
    if as_json:
        print_json(
            {
                **facts,
                "prefixes": [asdict(trunk) for trunk in trunks[:top]],
                "num_prefixes": len(trunks),
                "policies": policies,
            }
        )
        return
    output = console()
    output.print(_summary(facts, time.time()))
    if facts["pages_by_depth"]:
        output.print(_depths(facts["pages_by_depth"]))
    if trunks[:top]:
        output.print(_prefixes(trunks, top))
    for told in policies:
        output.print(policy_table(told, time.time()))


def depth_buckets(pages_by_depth: dict[int, int]) -> list[tuple[int, int, int]]:
    """(first depth, last depth, pages) in buckets that double: 0, 1, 2-3, 4-7, ..."""
    buckets: dict[int, int] = {}
    for depth, pages in pages_by_depth.items():
        level = depth.bit_length()
        buckets[level] = buckets.get(level, 0) + pages
    return [(1 << level >> 1, max(0, (1 << level) - 1), buckets.get(level, 0)) for level in range(max(buckets) + 1)]


def _trunks(directory: Path, facts: dict[str, Any]) -> list[Trunk]:
    from kvstore.cli.prefixes import find_trunks
    from kvstore.tiers.disk.tier import DiskTier

    tier = DiskTier.open(directory, facts["layout"], facts["slot_bytes"], 0, read_only=True)
    try:
        return find_trunks(tier.scan())
    finally:
        tier.close()


def _summary(facts: dict[str, Any], now: float) -> object:
    slots = facts["slots"]
    lines = table("directory", facts["path"])
    add_row(
        lines,
        "geometry",
        f"{slots} slots of {format_bytes(facts['slot_bytes'])}, {format_bytes(slots * facts['slot_bytes'])}",
    )
    add_row(lines, "layout", f"{facts['layout']} (format version {facts['format_version']})")
    share = f", {100 * facts['pages'] / slots:.0f} % full" if slots else ""
    add_row(lines, "pages", f"{facts['pages']} with {format_bytes(facts['stored_bytes'])}{share}")
    add_row(
        lines, "slots", f"{facts['free']} free, {facts['writing']} being written, {facts['expired']} with expired pages"
    )
    if facts["oldest_created_at"] is not None:
        ages = [
            format_seconds(max(0.0, round(now - facts[f"{which}_created_at"], 1))) for which in ("oldest", "newest")
        ]
        add_row(lines, "written", f"from {ages[0]} ago to {ages[1]} ago")
        add_row(lines, "in the last day", f"{format_bytes(facts['written_day_bytes'])} of what is still there")
    return lines


def _depths(pages_by_depth: dict[int, int]) -> object:
    buckets = depth_buckets(pages_by_depth)
    most = max(pages for _, _, pages in buckets)
    output = table("blocks before", "pages", "", title="pages by depth", right=("blocks before", "pages"))
    for first, last, pages in buckets:
        bar = "█" * max(1 if pages else 0, round(BAR_WIDTH * pages / most))
        add_row(output, str(first) if first == last else f"{first}-{last}", str(pages), bar)
    return output


def _prefixes(trunks: list[Trunk], top: int) -> object:
    shown = min(top, len(trunks))
    numbers = ("shared blocks", "branches", "longest", "pages", "bytes")
    output = table("begins with block", *numbers, title=f"biggest prefixes ({shown} of {len(trunks)})", right=numbers)
    for trunk in trunks[:top]:
        start = trunk.root[:16] if trunk.depth == 0 else f"{trunk.root[:16]} (depth {trunk.depth})"
        counts = (trunk.shared_blocks, trunk.branches, trunk.longest, trunk.pages)
        add_row(output, start, *map(str, counts), format_bytes(trunk.num_bytes))
    return output
