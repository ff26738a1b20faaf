"""The process behind `kvstore serve`: listens, greets clients, and gives everything back at the end.

One event loop carries it all; bytes are moved by the stores' lanes, and by the clients themselves in shared memory.

The end, on SIGTERM or SIGINT: nobody new is let in, lookups answer miss and prepares grant nothing; leases that are
open may end, for `service.drain_s`; then connections are closed, what is owed to disk and Redis is written, and the
stores are closed. The next daemon finds the disk as it was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import stat
from pathlib import Path
from typing import Any

from kvstore.config import Config
from kvstore.errors import ConfigError, StoreClosed
from kvstore.service.app import App, check_exposure
from kvstore.service.channel import Channel, Greeting
from kvstore.service.dashboard import Dashboard
from kvstore.service.door import Door
from kvstore.service.events import EventHub
from kvstore.service.metrics import open_files
from kvstore.service.namespaces import layout_from_json, namespace_from_json
from kvstore.service.session import Session
from kvstore.service.stores import OpenStore, Stores
from kvstore.service.tenants import LOCAL, Tenant, read_tokens

log = logging.getLogger(__name__)

BACKLOG = 1024
DRAIN_STEP_S = 0.02
MAX_NAME = 64  # of a client


class Daemon:
    """Listens on a unix socket for clients on this machine, and on HTTP for the rest. Its event loop only."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stores = Stores(config)
        self.sessions: dict[str, Session] = {}
        self.is_ready = False
        self.is_draining = False
        self._channels: set[Channel] = set()
        self._server: asyncio.AbstractServer | None = None
        self._socket: Path | None = None
        self._stop: asyncio.Event | None = None
        service = config.service
        self.tokens = None if service.tokens_file is None else read_tokens(service.tokens_file)
        self.events = EventHub(self.stores.all)
        self.dashboard = Dashboard(self)
        self.app = App(self)
        self.num_clients = 0
        self.num_reclaimed = 0

    @property
    def has_tokens(self) -> bool:
        """Whether HTTP clients must prove who they are."""
        return self.tokens is not None

    @property
    def tenants(self) -> list[Tenant]:
        """Everyone who may have stores here."""
        return [LOCAL, *(self.tokens.tenants if self.tokens is not None else [])]

    async def start(self) -> None:
        """Open what lies on disk, then listen. Raises ConfigError if the socket cannot be had."""
        self._stop = asyncio.Event()
        check_exposure(self.config.service)
        num_stores = await self.stores.restore(self.tenants)
        self._socket = socket_path(self.config.service.socket)
        listener = _listen(self._socket)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, sock=listener, backlog=BACKLOG)
        await self.app.start(self.config.service)
        self.dashboard.start()
        self.is_ready = True
        log.info("listening on %s, %d stores opened from disk", self._socket, num_stores)

    async def run(self) -> None:
        """Start, serve until SIGTERM, SIGINT or `stop`, and close."""
        loop = asyncio.get_running_loop()
        try:
            await self.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            assert self._stop is not None
            await self._stop.wait()
        finally:
            await self.close()

    def stop(self) -> None:
        """Have `run` come to its end."""
        if self._stop is not None:
            self._stop.set()

    async def close(self) -> None:
        """Drain, hang up, flush. Idempotent."""
        self.is_draining, self.is_ready = True, False
        until = asyncio.get_running_loop().time() + self.config.service.drain_s
        if self._server is not None:
            self._server.close()
        for session in self.sessions.values():
            session.is_draining = True
        while self.num_leases and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(DRAIN_STEP_S)
        if self.num_leases:
            log.warning("close: %d leases are still open after %.1f s", self.num_leases, self.config.service.drain_s)
        await self.events.close()
        await self.dashboard.close()
        for channel in list(self._channels):
            channel.close()
        await self.app.close()
        await asyncio.sleep(0)
        for session in list(self.sessions.values()):
            self._end(session)
        left_s = max(1.0, until - asyncio.get_running_loop().time())
        await self.stores.close(left_s)
        if self._server is not None and self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.unlink()
            self._server = None

    @property
    def num_leases(self) -> int:
        """Leases that clients hold."""
        return sum(len(session.leases) for session in self.sessions.values())

    def own_metrics(self) -> dict[str, float]:
        """The daemon's own numbers, by metric name."""
        return {
            "kvstore_service_clients": len(self.sessions),
            "kvstore_service_connections": len(self._channels),
            "kvstore_service_client_leases": self.num_leases,
            "kvstore_service_clients_total": self.num_clients,
            "kvstore_service_leases_reclaimed_total": self.num_reclaimed,
            "kvstore_service_http_requests_total": self.app.num_requests,
            "kvstore_service_http_refused_total": self.app.num_refused,
            "kvstore_service_event_streams": self.events.num_streams,
            "kvstore_service_open_files": open_files(),
        }

    def remote_channel(self, tenant: Tenant, peer: str) -> Channel:
        """A connection of a client on another machine."""
        channel = Channel(self, peer, tenant=tenant, is_local=False)
        self._channels.add(channel)
        return channel

    # ---- what channels ask --------------------------------------------------------------------------------------

    async def hello(self, channel: Channel, message: dict[str, Any]) -> Greeting:
        """Open a session, and its store if need be."""
        if self.is_draining:
            raise StoreClosed("the daemon is closing")
        if len(self.sessions) >= self.config.service.max_clients:
            raise ConfigError(f"service.max_clients is {self.config.service.max_clients}, and as many are attached")
        layout = layout_from_json(message.get("layout"))
        namespace = namespace_from_json(message.get("namespace"))
        opened = await self.stores.open(channel.tenant, layout, namespace)
        session = Session(secrets.token_hex(16), opened, _name(channel, message), is_remote=not channel.is_local)
        session.anchor = channel
        session.anchors.add(channel)
        self.sessions[session.id] = session
        self.num_clients += 1
        store = self.config.store
        answer = {
            "session": session.id,
            "namespace": opened.id,
            "num_slots": opened.handle.num_slots,
            "slot_bytes": opened.handle.slot_bytes,
            "lookup_deadline_s": store.lookup_deadline_s,
            "load_deadline_s": store.load_deadline_s,
        }
        log.info("client %s attached to %s", channel.peer, opened.id)
        return Greeting(session, answer, _slab_fd(opened) if channel.is_local else None)

    def attach(self, channel: Channel, message: dict[str, Any]) -> Greeting | None:
        """Another connection of a session; with "anchor" one of those that keep it alive, with "slab" its slab."""
        session = self.sessions.get(str(message.get("session")))
        if session is None or session.is_orphan or session.opened.tenant != channel.tenant:
            return None
        if message.get("anchor") is True:
            session.anchors.add(channel)
        wants_slab = channel.is_local and message.get("slab") is True
        return Greeting(session, None, _slab_fd(session.opened) if wants_slab else None)

    def lost(self, channel: Channel) -> None:
        """A connection ended; with its last anchor, a client."""
        self._channels.discard(channel)
        session = channel.session
        if session is None or channel not in session.anchors:
            return
        session.anchors.discard(channel)
        is_client = channel is session.anchor
        if not session.anchors or (is_client and not session.leases):
            self._end(session)
        elif is_client:
            # Ranks of its engine may still copy: what it leased is released when they have hung up, too.
            log.warning("client %s is gone, %d of its ranks are not", session.client, len(session.anchors))
            session.orphan()
            for rank in session.anchors:
                rank.tell_lost()

    # ---- private ------------------------------------------------------------------------------------------------

    def _end(self, session: Session) -> None:
        if self.sessions.pop(session.id, None) is None:
            return
        num_released = session.close()
        for channel in list(self._channels):
            if channel.session is session:
                channel.close()
        self.num_reclaimed += num_released
        if num_released:
            log.warning("client %s is gone: released its %d leases", session.client, num_released)
        else:
            log.info("client %s detached", session.client)

    def _accept(self) -> Door:
        return Door(self._channel, self.app.protocol)

    def _channel(self) -> Channel:
        channel = Channel(self, "local", tenant=LOCAL, is_local=True)
        self._channels.add(channel)
        return channel


def _name(channel: Channel, message: dict[str, Any]) -> str:
    """Who a client says it is, and where it is if that is not here."""
    name = str(message.get("client") or "")[:MAX_NAME]
    return channel.peer if not name else name if channel.is_local else f"{name} ({channel.peer})"


def _slab_fd(opened: OpenStore) -> int:
    return os.open(opened.handle.path, os.O_RDWR | os.O_CLOEXEC)


def socket_path(path: Path | None) -> Path:
    """Where the socket is: as configured, else in the user's runtime directory, else in /tmp under the user's id."""
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


def serve(config: Config) -> None:
    """Run a daemon until it is told to stop."""
    asyncio.run(Daemon(config).run())
