"""The process behind `kvstore serve`: listens, greets clients, and gives everything back at the end.

One event loop carries it all; bytes are moved by the stores' lanes, and by the clients themselves in shared memory.

The end, on SIGTERM or SIGINT: nobody new is let in, lookups answer miss and prepares grant nothing; leases that are
open may end, for `service.drain_s`; then connections are closed, what is owed to lower tiers is written, and the
stores are closed. The next daemon finds the disk as it was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore import logs
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.service.daemon import summary
from kvstore.service.daemon.clients import Clients
from kvstore.service.daemon.events import EventHub
from kvstore.service.daemon.listener import Door
from kvstore.service.daemon.preflight import Preflight
from kvstore.service.daemon.state import DaemonState, tenants_of
from kvstore.service.daemon.stores import Stores
from kvstore.service.daemon.tenants import Tokens, read_tokens
from kvstore.service.daemon.transfers import Transfers
from kvstore.service.dashboard import page
from kvstore.service.dashboard.dashboard import Dashboard
from kvstore.service.http.app import App, check_exposure
from kvstore.service.http.metrics import open_files
from kvstore.web import descriptors
from kvstore.web.connections import Connection, Connections
from kvstore.web.listener import Listener

log = logging.getLogger(__name__)
faults = logs.limited(f"{__name__}.faults")

BACKLOG = 1024  # a connect to a unix socket whose backlog is full fails at once
SPARE_FILES = 16
SPARE_REFILL_S = 1.0
DRAIN_STEP_S = 0.02


class Daemon:
    """Listens on a unix socket for clients on this machine, and on HTTP for the rest. Its event loop only."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stores = Stores(config)
        self.events = EventHub(self.stores.all)
        self.clients = Clients(config, self.stores, self.events)
        self.preflight = Preflight(config)
        self.budget = descriptors.budget(descriptors.limit())
        self._silent = Connections(self.budget.silent)
        self._spare = descriptors.Spare(0)
        self._listener: Listener | None = None
        self._stop = asyncio.Event()
        self._why_stopped = "stopped"
        self.num_restored = 0
        service = config.service
        tokens = None if service.tokens_file is None else read_tokens(service.tokens_file)
        _hide(config, tokens)
        self.transfers = Transfers(service.lease_max_s, lambda: next(self.clients.numbers))
        self.transfers.num_tenants = len(tenants_of(tokens))
        self.state = DaemonState(
            config,
            self.stores,
            self.events,
            self.clients,
            self.transfers,
            tokens,
            own_metrics=self._own_metrics,
            reasons=self._reasons,
        )
        self.dashboard = Dashboard(self.state)
        self.app = App(self.state, self.budget, self.dashboard.routes(), page.add_routes)

    @property
    def socket(self) -> Path | None:
        """The socket for clients on this machine; None before the start."""
        return self.state.progress.socket

    async def start(self) -> None:
        """Open what lies on disk, then listen. Raises ConfigError if something cannot be had or can never work."""
        check_exposure(self.config.service)
        await asyncio.to_thread(self.preflight.check)
        await self.preflight.start()
        num_stores = await self.stores.restore(self.state.tenants)
        path = self.state.progress.socket = socket_path(self.config.service.socket)
        listener = _listen(path)
        try:
            # HTTP first: whoever finds the socket open finds everything open.
            await self.app.start(self.config.service)
            self._spare = descriptors.Spare(SPARE_FILES)
            listener.listen(BACKLOG)
            self._listener = Listener("unix socket", listener, self._silent, self._door, make_way=self._make_way)
            self._listener.start()
        except BaseException:
            listener.close()
            path.unlink(missing_ok=True)
            raise
        self.dashboard.start()
        self.clients.start()
        self.state.progress.is_ready = True
        self.num_restored = num_stores
        log.info("listening on %s, %d stores opened from disk", path, num_stores)

    async def run(self, announce: Callable[[str], None] = lambda line: None) -> None:
        """Start, serve until SIGTERM, SIGINT or `stop`, and close. announce: is told what is up, and the end."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_fault)
        for number in (signal.SIGTERM, signal.SIGINT):
            # Before the start, which may take long: it ends well, too.
            loop.add_signal_handler(number, self.stop, number.name)
        try:
            await self.start()
            for line in summary.started(
                self.state, self.preflight, self.budget.limit, self.app.port, self.num_restored
            ):
                announce(line)
            await self._stop.wait()
            announce(summary.ending(self.state, self._why_stopped))
        finally:
            was_up = self.state.progress.is_ready
            await self.close()
        if was_up:
            announce(
                summary.ended(
                    sum(max(one.store.stats()["owed_pages"].values(), default=0) for one in self.stores.all())
                )
            )

    def stop(self, why: str = "stopped") -> None:
        """Make `run` come to its end."""
        self._why_stopped = why
        self._stop.set()

    async def close(self) -> None:
        """Drain, hang up, flush. Idempotent."""
        progress = self.state.progress
        progress.is_draining, progress.is_ready = True, False
        until = asyncio.get_running_loop().time() + self.config.service.drain_s
        if self._listener is not None:
            self._listener.close()
        self.clients.drain()
        while self.state.num_leases and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(DRAIN_STEP_S)
        if self.state.num_leases:
            drain_s = self.config.service.drain_s
            log.warning("close: %d leases are still open after %.1f s", self.state.num_leases, drain_s)
        for transfer in self.transfers:
            transfer.end()
        await self.preflight.close()
        await self.events.close()
        await self.dashboard.close()
        await self.app.close()
        while self._silent.drop_one():
            pass
        await self.clients.close()
        left_s = max(1.0, until - asyncio.get_running_loop().time())
        await self.stores.close(left_s)
        self._spare.close()
        if self._listener is not None and progress.socket is not None:
            with contextlib.suppress(OSError):
                progress.socket.unlink()
            self._listener = None

    # ---- private ------------------------------------------------------------------------------------------------

    def _own_metrics(self) -> dict[str, float]:
        """The daemon's own numbers, by metric name."""
        overdue_leases, overdue_slots = self.clients.overdue
        return {
            "kvstore_service_clients": len(self.clients.sessions),
            "kvstore_service_connections": self.clients.num_connections,
            "kvstore_service_client_leases": self.state.num_leases,
            "kvstore_service_overdue_leases": overdue_leases,
            "kvstore_service_overdue_slots": overdue_slots,
            "kvstore_service_clients_total": self.clients.num_attached,
            "kvstore_service_leases_reclaimed_total": self.clients.num_reclaimed,
            "kvstore_service_leases_expired_total": self.transfers.num_expired,
            "kvstore_service_http_requests_total": self.app.num_requests,
            "kvstore_service_http_refused_total": self.app.num_refused,
            "kvstore_service_http_connections": len(self.app.connections),
            "kvstore_service_connections_dropped_total": self.app.connections.num_dropped + self._silent.num_dropped,
            "kvstore_service_connections_refused_total": self.app.connections.num_refused + self._silent.num_refused,
            "kvstore_service_page_transfers": len(list(self.transfers)),
            "kvstore_service_event_streams": self.events.num_streams,
            "kvstore_service_open_files": open_files(),
        }

    def _reasons(self) -> tuple[list[str], list[str]]:
        """The reasons for which the daemon does not serve, and the parts that it serves without."""
        without = [f"{tier}: out of use, its breaker is open" for tier in self.dashboard.tiers_down]
        # No more than that: who asks may be anybody, and the medium's words have names of hosts and accounts in them.
        without += [f"{tier}: no {', '.join(ways)}" for tier, ways in self.dashboard.directions_down.items()]
        # As long as nobody has opened a store: would it be possible?
        unable = [] if self.stores.all() else self.preflight.recent_problems()
        for tier, problem in self.preflight.unreached.items():
            told = f"{tier}: not reached since the start: {problem}"
            (without if self.config.service.ready_without_redis else unable).append(told)
        return unable, without

    def _door(self, connection: Connection) -> Door:
        return Door(connection, self.clients.channel, self.app.protocol)

    def _make_way(self) -> bool:
        """Engines come by the unix socket: when descriptors run out, strangers go, and one that was kept is given."""
        self.app.connections.drop_one()
        asyncio.get_running_loop().call_later(SPARE_REFILL_S, self._spare.refill)
        return self._spare.let_go()


def socket_path(path: Path | None) -> Path:
    """The path of the socket: as configured, else in the user's runtime directory, else in /tmp under the user's id."""
    if path is not None:
        return path
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "kvstore.sock" if runtime else Path(f"/tmp/kvstore-{os.getuid()}.sock")


def _listen(path: Path) -> socket.socket:
    """Bind the socket for its owner alone, taking the place of one that nobody listens on any more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        before = os.umask(0o177)  # there must be no moment in which others may connect
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise ConfigError(f"service.socket is {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _make_way(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"service.socket is {path}, which is no socket; name another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
                return
    raise ConfigError(f"service.socket is {path}, where another daemon listens; stop it or name another path")


def _hide(config: Config, tokens: Tokens | None) -> None:
    """Mask every secret of the configuration in the log, whichever part writes it there."""
    if tokens is not None:
        logs.know(tokens.digests)
    for kind, section in config.tiers():
        logs.know(kind.secrets(section))


def _log_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody caught: the type and the place, for its text may hold what a client sent."""
    error = context.get("exception")
    faults.error("%s: %s", context.get("message", "a fault"), "-" if error is None else logs.where(error))


def serve(config: Config, announce: Callable[[str], None] = lambda line: None) -> None:
    """Run a daemon until it is told to stop. announce: is told what is up, and the end."""
    daemon = Daemon(config)
    # The process is ours, and what is in it by now stays as long as it does: modules, schemas, routes. A full
    # collection would walk these 70,000 objects each time, 67 ms in which nobody is served.
    gc.collect()
    gc.freeze()
    asyncio.run(daemon.run(announce))
