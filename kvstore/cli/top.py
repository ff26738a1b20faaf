"""`kvstore top`: what the dashboard shows, in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.console import console
from kvstore.errors import ConfigError, TierUnavailable

if TYPE_CHECKING:
    from kvstore.service.dashboard.client import DashboardClient

PERIOD_S = 1.0


def top(
    url: Annotated[
        str | None,
        typer.Argument(help="unix:///path/of/socket or http(s)://host:port; else service.url, else the local socket."),
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Token of a tenant, for a daemon that asks for one.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once and exit; a pipe always does.")] = False,
) -> None:
    """Show what a node daemon's cache is doing, once a second: hit rate, tiers, flows, prefixes, misses.

    Ctrl-C ends it. The same and more is on the page at the daemon's HTTP address.
    """
    from kvstore.config.sections import Config
    from kvstore.config.sources import Setting
    from kvstore.service.daemon.daemon import socket_path
    from kvstore.service.dashboard.client import DashboardClient

    given = {"service.token": Setting(token, "--token")} if token else {}
    service = Config.load(None, **given).service
    client = DashboardClient(
        _checked(url) if url else service.url or f"unix://{socket_path(service.socket)}",
        None if service.token is None else service.token.get_secret_value(),
        service.tls_ca,
    )
    if once or not sys.stdout.isatty():
        from kvstore.cli.top_view import TopView

        console().print(TopView.ask(client, span_s=60.0))
        return
    _watch(client)


def _checked(url: str) -> str:
    from kvstore.config.secret import mask_url
    from kvstore.config.values import api_url

    try:
        return api_url(url)
    except ValueError as error:
        raise ConfigError(f"URL is {mask_url(url)!r}; {error}") from None


def _watch(client: DashboardClient) -> None:
    from rich.live import Live
    from rich.text import Text

    from kvstore.cli.top_view import TopView

    view = TopView.ask(client, span_s=60.0)  # one that is not there is told before the screen is taken
    try:
        with Live(view, console=console(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(PERIOD_S)
                try:
                    view = TopView.ask(client, span_s=60.0)
                    live.update(view, refresh=True)
                except TierUnavailable as error:
                    view.away = Text(f" {error}; trying again", style="bold white on red")
                    live.update(view, refresh=True)
    except KeyboardInterrupt:
        pass
