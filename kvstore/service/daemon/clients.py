"""The clients that are attached to a daemon: their sessions, and what they hold for how long.

A client lives as long as its anchor is open; what it held is released when that closes, or, where ranks of its engine
may still copy, when theirs do.

The hard thing: a client that is stopped (SIGSTOP) is not dead. It has the slab mapped, may wake at any time and go on
reading and writing where it was, and nobody can forbid it. So its leases are kept, however old: the slots are out of
use, counted as overdue, shown with the process that holds them, and free again when that process ends.

The daemon's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from kvstore import logs
from kvstore.config.sections import Config
from kvstore.errors import ConfigError, RequestError, StoreClosed
from kvstore.service.daemon.connection import Channel
from kvstore.service.daemon.events import EventHub, Feed
from kvstore.service.daemon.greeting import Greeting
from kvstore.service.daemon.guard import goes_on
from kvstore.service.daemon.isolation import StagedSaves
from kvstore.service.daemon.session import ClientSession
from kvstore.service.daemon.stores import Stores
from kvstore.service.daemon.tenants import LOCAL
from kvstore.service.protocol.namespaces import layout_from_json, namespace_from_json

log = logging.getLogger(__name__)

MAX_NAME = 64  # of a client
MAX_CONNECTIONS = 1024  # of a client: one for each of its threads, and one for each rank
MAX_HELD_BYTES = 256 << 20  # of messages that are not whole, beyond 64 KiB for each connection
LONGEST_LOOK_S = 5.0  # between two looks for overdue leases
MAX_STRANGERS = 256  # connections that have not said yet whose they are; the oldest goes when one more comes


class Clients:
    """The sessions of a daemon, and the connections they came by."""

    def __init__(
        self, config: Config, stores: Stores, events: EventHub, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.sessions: dict[str, ClientSession] = {}
        self.is_draining = False
        self.numbers = count(1)  # name clients, and transfers of pages, to operators
        self.num_attached = 0
        self.num_reclaimed = 0
        self._config = config
        self._stores = stores
        self._events = events
        self._now = now
        self._channels: set[Channel] = set()
        self._strangers: dict[Channel, None] = {}
        self._held_bytes = 0
        self._watching: asyncio.Task[None] | None = None

    def channel(self) -> Channel:
        """One more connection."""
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()
        channel = Channel(self, "local")
        self._channels.add(channel)
        self._strangers[channel] = None
        return channel

    def start(self) -> None:
        """Look for overdue leases from now on."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def drain(self) -> None:
        """Admit no client any more, and grant nothing."""
        self.is_draining = True
        for session in self.sessions.values():
            session.is_draining = True

    async def close(self) -> None:
        """Hang up, and release what is left. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        for channel in list(self._channels):
            channel.close()
        await asyncio.sleep(0)
        for session in list(self.sessions.values()):
            with goes_on(log, "client %s: its session does not end", session.client):
                self.end(session)

    def end(self, session: ClientSession) -> None:
        """The client is gone, or shall be: release its leases and hang up. Idempotent."""
        if self.sessions.pop(session.id, None) is None:
            return
        num_released = session.close()
        for channel in self.connections(session):
            channel.close()
        self.num_reclaimed += num_released
        if num_released:
            log.warning("client %s is gone: released its %d leases", session.client, num_released)
        else:
            log.info("client %s detached", session.client)

    def find(self, number: str) -> ClientSession | None:
        """The session of that number."""
        return next((session for session in self.sessions.values() if str(session.number) == number), None)

    def connections(self, session: ClientSession) -> list[Channel]:
        """The session's connections, anchors among them."""
        return [channel for channel in self._channels if channel.session is session]

    @property
    def num_connections(self) -> int:
        """Connections, also of those who have not said hello."""
        return len(self._channels)

    @property
    def num_leases(self) -> int:
        """Leases that clients hold."""
        return sum(len(session.leases) for session in self.sessions.values())

    @property
    def overdue(self) -> tuple[int, int]:
        """Leases held for longer than `service.lease_max_s`, and the slots in them."""
        before = self._now() - self._config.service.lease_max_s
        pages = [
            len(session.leases[lease_id].lease.pages)
            for session in self.sessions.values()
            for lease_id in session.overdue(before)
        ]
        return len(pages), sum(pages)

    # ---- what channels ask --------------------------------------------------------------------------------------

    async def hello(self, channel: Channel, message: dict[str, Any]) -> Greeting:
        """Open a session, and its store if need be."""
        if self.is_draining:
            raise StoreClosed("the daemon is closing")
        most = self._config.service.max_clients
        if len(self.sessions) >= most:
            raise ConfigError(f"service.max_clients is {most}, and as many are attached")
        layout = layout_from_json(message.get("layout"))
        namespace = namespace_from_json(message.get("namespace"))
        opened = await self._stores.open(LOCAL, layout, namespace)
        service = self._config.service
        staged = StagedSaves(opened.store, service.isolate_bytes) if service.isolate else None
        self.num_attached += 1
        feed = Feed(self._events, opened)
        if message.get("events") is True:
            feed.listen()
        session = ClientSession(
            secrets.token_hex(16),
            opened,
            _name(channel, message),
            feed,
            number=next(self.numbers),
            pid=channel.pid,
            rendering=_rendering(message),
            staged=staged,
            now=self._now,
        )
        session.anchor = channel
        session.anchors.add(channel)
        self.sessions[session.id] = session
        self._strangers.pop(channel, None)
        store = self._config.store
        answer = {
            "session": session.id,
            "namespace": opened.id,
            "num_slots": opened.handle.num_slots,
            "slot_bytes": opened.handle.slot_bytes,
            "num_staging": 0 if staged is None else staged.num_slots,
            "lookup_deadline_s": store.lookup_deadline_s,
            "loss": int(opened.store.loss),
            "load_deadline_s": store.load_deadline_s,
        }
        log.info("client %s attached to %s", session.client, opened.id)
        return Greeting(session, answer, session.descriptors())

    def attach(self, channel: Channel, message: dict[str, Any]) -> Greeting | None:
        """Another connection of a session; with "anchor" one of those that keep it alive, with "slab" its slab."""
        session = self.sessions.get(str(message.get("session")))
        if session is None or session.is_orphan:
            return None
        if len(self.connections(session)) >= MAX_CONNECTIONS:
            raise RequestError(f"this client has {MAX_CONNECTIONS} connections; it may have no more")
        self._strangers.pop(channel, None)
        if message.get("anchor") is True:
            session.anchors.add(channel)
        return Greeting(session, None, session.descriptors() if message.get("slab") is True else ())

    def lost(self, channel: Channel) -> None:
        """A connection ended; with its last anchor, a client."""
        self._channels.discard(channel)
        self._strangers.pop(channel, None)
        session = channel.session
        if session is None or channel not in session.anchors:
            return
        session.anchors.discard(channel)
        is_client = channel is session.anchor
        if not session.anchors or (is_client and not session.leases):
            self.end(session)
        elif is_client:
            # Ranks of its engine may still copy: what it leased is released when they have hung up, too.
            log.warning("client %s is gone, %d of its ranks are not", session.client, len(session.anchors))
            session.orphan()
            for rank in session.anchors:
                rank.tell_lost()

    def may_hold(self, channel: Channel, num_bytes: int) -> bool:
        """Whether connections may hold so many more bytes of messages that are not whole."""
        held = self._held_bytes + num_bytes
        if num_bytes > 0 and held > MAX_HELD_BYTES:
            return False
        self._held_bytes = held
        return True

    # ---- private ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        lease_max_s = self._config.service.lease_max_s
        while True:
            await asyncio.sleep(min(LONGEST_LOOK_S, lease_max_s / 4))
            before = self._now() - lease_max_s
            for session in list(self.sessions.values()):
                with goes_on(log, "client %s: its leases are not looked at", session.client):
                    self._look_at(session, before)

    def _look_at(self, session: ClientSession, before: float) -> None:
        leases = session.overdue(before)
        if leases and not session.is_overdue:
            log.warning(
                "client %s, process %s, has held %d leases for longer than service.lease_max_s (%.0f s): their "
                "slots are out of use until they end, or the process does",
                session.client,
                session.pid,
                len(leases),
                self._config.service.lease_max_s,
            )
        session.is_overdue = bool(leases)


def _rendering(message: dict[str, Any]) -> str:
    """The fingerprint of how a client renders chats; "" if it says none that could be one."""
    said = message.get("rendering")
    return said if isinstance(said, str) and re.fullmatch(r"[0-9a-f]{1,64}", said) else ""


def _name(channel: Channel, message: dict[str, Any]) -> str:
    """The name that a client gives itself."""
    said = message.get("client")
    # It goes into logs and JSON: no secret, no line of its own, and nothing that no text can be (half of a surrogate
    # pair). Masked before it is cut: half of a token is one that nobody knows.
    shown = logs.mask(said[: 16 * MAX_NAME])[:MAX_NAME] if isinstance(said, str) else ""
    name = "".join(char if char.isprintable() else "?" for char in shown)
    return name or channel.peer
