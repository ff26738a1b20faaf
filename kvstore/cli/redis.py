"""`kvstore redis check URL`: a server looked at as a place for pages, before it is one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.command import Command
from kvstore.console import add_row, console, print_json, table
from kvstore.errors import ConfigError, TierRefused

if TYPE_CHECKING:
    from kvstore.tiers.redis.advice import Advice

STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
TIMEOUT_S = 5.0

redis = typer.Typer(no_args_is_help=True, help="Look at Redis and Valkey servers.")


@redis.command(cls=Command, no_args_is_help=True)
def check(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="As redis.url: redis, rediss, unix, redis+sentinel or redis+cluster.")
    ],
    page_bytes: Annotated[
        str, typer.Option("--page-bytes", metavar="SIZE", help="Bytes of a page: 2MiB for 16 tokens of an 8B model.")
    ] = "2MiB",
    prefix: Annotated[str, typer.Option("--prefix", help="redis.prefix: where the account may write.")] = "kv:",
    capacity: Annotated[
        bool, typer.Option("--bounded", help="redis.capacity_bytes is set, so the server need not evict.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a server is a good place for pages, what to change, and why.

    Looked at: version, role, maxmemory and what leaves when it is full, memory of clients, persistence, replicas, and
    how long one page takes; of a cluster, every node that holds keys. One page is written, read and deleted, and no
    setting is changed. What the account may not ask is left out. Exit code 1 if something is bad, 2 if the server is
    not reached.

    \b
      kvstore redis check redis://cache:6379
      kvstore redis check redis+cluster://a:7000,b:7000 --page-bytes 512KiB
    """
    from kvstore.tiers.redis.advice import Advice, advise, advise_times, differing
    from kvstore.tiers.redis.info import ask_servers, time_pages
    from kvstore.units import parse_bytes

    try:
        size = parse_bytes(page_bytes)
    except ValueError as error:
        raise ConfigError(f"--page-bytes: {error}") from None
    if not 0 < size <= 512 << 20:
        raise ConfigError(f"--page-bytes is {page_bytes}; a page has from 1 byte to 512 MiB")
    servers = ask_servers(url, timeout_s=TIMEOUT_S)
    found: list[Advice] = []
    for server in servers:
        found += advise(server, page_bytes=size, is_bounded=capacity)
    found += differing(servers)
    try:
        found.append(advise_times(servers[0].where, time_pages(url, size, prefix=prefix, timeout_s=TIMEOUT_S)))
    except TierRefused as error:
        found.append(
            Advice(servers[0].where, "a page", "bad", "it is refused", str(error), "let the account store pages")
        )
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        _print(found)
    if any(one.state == "bad" for one in found):
        raise typer.Exit(1)


def _print(found: list[Advice]) -> None:
    from rich.text import Text

    output = table("", "server", "what", "found", "why", "what to do")
    for one in found:
        add_row(output, Text(one.state, style=STYLES[one.state]), one.where, one.what, one.found, one.why, one.do)
    console().print(output)
