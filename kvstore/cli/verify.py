"""`kvstore verify DIR`: read every page of a disk tier and check it against its record and checksum."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.directory import Directory, check_directory
from kvstore.console import add_row, console, print_json, table
from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kvstore.tiers.disk.report import PageCheck

EXIT_BAD = 1
MOST_BAD_SHOWN = 20


def verify(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Read every page of a disk tier and check it; exit code 1 if any is bad.

    Bad pages are never served: the store checks the same on every read, and drops them. Nothing is changed here, and
    other processes may use the directory meanwhile.
    """
    from kvstore.progress import ProgressBar
    from kvstore.tiers.disk.report import describe
    from kvstore.tiers.disk.report import verify as check_pages

    check_directory(directory)
    total = describe(directory)["pages"]
    started = time.perf_counter()
    bad: list[PageCheck] = []
    good = good_bytes = 0
    with nullcontext() if as_json or quiet else ProgressBar(console(stderr=True)) as bar:
        for check in check_pages(directory):
            if check.ok and check.record is not None:
                good += 1
                good_bytes += check.record.header.stored_bytes
            else:
                bad.append(check)
            if bar is not None:
                checked = good + len(bad)
                bar.update(f"verify: {checked} of {total} pages, {len(bad)} bad", checked, total)
    seconds = time.perf_counter() - started
    result = {
        "path": str(directory),
        "pages": good + len(bad),
        "good": good,
        "bad": len(bad),
        "good_bytes": good_bytes,
        "seconds": seconds,
        "bad_pages": [_as_row(check) for check in bad],
    }
    if as_json:
        print_json(result)
    else:
        _print(result)
    if bad:
        raise typer.Exit(EXIT_BAD)


def _as_row(check: PageCheck) -> dict[str, Any]:
    from kvstore.page import split_key

    block_hash, group, shard = split_key(check.key)
    depth = None if check.record is None else check.record.header.depth
    return {"block": block_hash.hex(), "group": group, "shard": shard, "depth": depth, "reason": check.reason}


def _print(result: dict[str, Any]) -> None:
    from rich.text import Text

    output = console()
    speed = result["good_bytes"] / max(result["seconds"], 1e-9)
    numbers = ("pages", "good", "bad", "bytes", "time", "rate")
    summary = table(*numbers, right=numbers)
    output.print(Text(result["path"], style="bold"), soft_wrap=True)
    add_row(
        summary,
        str(result["pages"]),
        str(result["good"]),
        Text(str(result["bad"]), style="bold red") if result["bad"] else "0",
        format_bytes(result["good_bytes"]),
        format_seconds(round(result["seconds"], 3)),
        f"{format_bytes(speed)}/s",
    )
    output.print(summary)
    if not result["bad"]:
        output.print("every page is what was written" if result["pages"] else "no page is stored")
        return
    listing = table("block", "group", "depth", "what is wrong", title="bad pages", right=("group", "depth"))
    for row in result["bad_pages"][:MOST_BAD_SHOWN]:
        add_row(
            listing,
            row["block"][:16],
            str(row["group"]),
            "?" if row["depth"] is None else str(row["depth"]),
            row["reason"],
        )
    output.print(listing)
    hidden = result["bad"] - MOST_BAD_SHOWN
    if hidden > 0:
        output.print(f"... and {hidden} more; --json lists all of them")
    output.print("The store drops these pages when it meets them, and computes them again. Nothing has to be repaired.")
