"""The state that all parts of a daemon look at: tenants, their stores, clients and transfers, and its phase.

`Daemon` makes it and hands it to the HTTP API and the dashboard, which know nothing of the process above them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from kvstore.config.sections import Config
from kvstore.service.daemon.clients import Clients
from kvstore.service.daemon.events import EventHub
from kvstore.service.daemon.session import ClientSession
from kvstore.service.daemon.stores import Stores
from kvstore.service.daemon.tenants import LOCAL, Tenant, Tokens
from kvstore.service.daemon.transfers import Transfers


def our_version() -> str:
    """The version of the distribution; "0" where it is not installed."""
    try:
        return version("kvtiers")
    except PackageNotFoundError:
        return "0"


@dataclass
class Phase:
    """How far a daemon is: starting, ready, draining."""

    is_ready: bool = False
    is_draining: bool = False
    socket: Path | None = None

    @property
    def word(self) -> Literal["starting", "ready", "draining"]:
        """The same as one word."""
        return "draining" if self.is_draining else "ready" if self.is_ready else "starting"


@dataclass(frozen=True)
class DaemonState:
    """The parts of a daemon that others look at. Its event loop only.

    tokens:      None where HTTP clients need not prove who they are.
    own_metrics: the daemon's own numbers, by metric name.
    reasons:     what keeps the daemon from serving, and what it serves without.
    """

    config: Config
    stores: Stores
    events: EventHub
    clients: Clients
    transfers: Transfers
    tokens: Tokens | None
    own_metrics: Callable[[], dict[str, float]]
    reasons: Callable[[], tuple[list[str], list[str]]]
    progress: Phase = field(default_factory=Phase)
    version: str = field(default_factory=our_version)

    @property
    def sessions(self) -> dict[str, ClientSession]:
        """Those of the clients that are attached."""
        return self.clients.sessions

    @property
    def tenants(self) -> list[Tenant]:
        """Everyone who may have stores here."""
        return tenants_of(self.tokens)

    @property
    def num_leases(self) -> int:
        """Leases of clients and of transfers of pages."""
        return self.clients.num_leases + self.transfers.num_leases


def tenants_of(tokens: Tokens | None) -> list[Tenant]:
    """Everyone who may have stores in a daemon with these tokens."""
    return [LOCAL, *(tokens.tenants if tokens is not None else [])]
