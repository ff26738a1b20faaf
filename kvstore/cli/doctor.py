"""`kvstore doctor`: what is well and what is not, before anything is started."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvstore.cli.config import overrides
from kvstore.cli.options import ConfigFile
from kvstore.console import add_row, console, print_json, table

STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    file: ConfigFile = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a value, e.g. disk.path=/nvme/kv."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine and installation: what works, what works worse than it could, and what to do.

    Names that other packages take, plug-ins, compiled parts, processor, memory, huge pages; of configured tiers
    O_DIRECT, free disk, and what the server says of itself; installed engines. Nothing is changed. Exit code 1 if
    something is bad.

    \b
      kvstore doctor
      kvstore doctor --set disk.path=/nvme/kv --set redis.url=redis://cache:6379
    """
    from rich.text import Text

    from kvstore.config.sections import Config
    from kvstore.doctor import examine

    found = examine(Config.load(file, **overrides(setting or [])))
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        output = table("", "what", "found", "what to do")
        for one in found:
            add_row(output, Text(one.state, style=STYLES[one.state]), one.what, one.found, one.do)
        console().print(output)
    if any(one.state == "bad" for one in found):
        raise typer.Exit(1)
