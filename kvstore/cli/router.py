"""`kvstore router`: one address for several replicas, until SIGTERM."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.cli.options import ListenHost, ListenPort, announcer
from kvstore.extras import require


def router(
    replica: Annotated[
        list[str] | None,
        typer.Option("--replica", "-r", metavar="URL", help="http://host:port of a replica; once for each of them."),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="round-robin, or prefix: where least has to be computed.")
    ] = "round-robin",
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8000,
    lookup_deadline_s: Annotated[
        float, typer.Option("--lookup-deadline-s", min=0.001, help="prefix: longest wait for the replicas' views.")
    ] = 0.5,
    health_interval_s: Annotated[
        float, typer.Option("--health-interval-s", min=0.01, help="Between two questions whether a replica is ready.")
    ] = 0.5,
    watch_prefixes: Annotated[
        str,
        typer.Option(
            "--watch-prefixes",
            metavar="MODEL|plain",
            help="Follow where sessions leave their prefix (GET /v1/prefix, metrics), rendered by its template.",
        ),
    ] = "",
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log replicas that come and go, and retries.")
    ] = False,
) -> None:
    """Forward OpenAI's API to replicas.

    A replica that cannot be reached, is not ready or dies before its first byte: the next one is asked. If it dies in
    the middle of a stream, the stream ends with an error event that says so. Only if all refuse does the client get a
    429. GET /v1/replicas shows who is there.

    \b
      kvstore router --replica http://127.0.0.1:8001 --replica http://127.0.0.1:8002 --policy prefix
    """
    from kvstore import logs
    from kvstore.cluster.router import RouterSettings, serve
    from kvstore.web.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    if watch_prefixes:
        require("prefix", "--watch-prefixes")
    settings = RouterSettings(replica or [], policy, host, port, lookup_deadline_s, health_interval_s, watch_prefixes)
    serve(settings, announcer())
