"""`kvstore serve`: the node daemon, until SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.config import overrides


def serve(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="TOML file, instead of $KVSTORE_CONFIG or ./kvstore.toml.")
    ] = None,
    socket: Annotated[Path | None, typer.Option("--socket", help="Unix socket to listen on.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a value, e.g. host.capacity_bytes=8GiB."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every client that comes and goes.")] = False,
) -> None:
    """Keep one cache for all engine processes of this machine.

    Clients attach with KVSTORE_SERVICE__URL=unix:///path. SIGTERM drains and flushes; what is on disk is there again
    after the next start.
    """
    from kvstore.config import Config
    from kvstore.service import logs
    from kvstore.service.daemon import serve as run
    from kvstore.service.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    values = overrides(setting or [])
    if socket is not None:
        values["service.socket"] = socket
    run(Config.load(file, **values))
