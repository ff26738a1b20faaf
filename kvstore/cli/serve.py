"""`kvstore serve`: the node daemon, until SIGTERM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.config import overrides
from kvstore.cli.options import ConfigFile
from kvstore.console import console


def serve(
    file: ConfigFile = None,
    socket: Annotated[Path | None, typer.Option("--socket", help="Unix socket to listen on.")] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="File to record requests in, for `kvstore replay`; no text.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a value, e.g. host.capacity_bytes=8GiB."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every client that comes and goes.")] = False,
) -> None:
    """Keep one cache for all engine processes of this machine.

    Engines attach with KVSTORE_SERVICE__URL=unix:///path. The dashboard, the HTTP API and /metrics are at
    http://127.0.0.1:8470 (service.http_host, service.http_port; none turns them off). It says what is up once it
    listens; a value that can never work stops the start. SIGTERM and Ctrl-C drain and flush; what is on disk is there
    again after the next start.

    \b
      kvstore serve --set host.capacity_bytes=8GiB --set disk.path=/srv/kv
      kvstore top
    """
    from kvstore import logs
    from kvstore.config.sections import Config
    from kvstore.config.sources import Setting
    from kvstore.service.daemon.daemon import serve as run
    from kvstore.web.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    values = overrides(setting or [])
    if socket is not None:
        values["service.socket"] = Setting(socket, "--socket")
    if record is not None:
        values["store.record"] = Setting(record, "--record")
    errors = console(stderr=True)
    run(Config.load(file, **values), lambda line: errors.print(line, markup=False, soft_wrap=True))
