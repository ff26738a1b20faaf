"""The event feed of a daemon's client: a thread asks, `take` never waits.

Whoever follows must never go on believing in a block that has left. So when events may have been lost (the daemon died
or does not answer, or nobody took them for too long) those that are kept give way to one `DROPPED`: all that was told
before it may not be so any more.
"""

from __future__ import annotations

import logging
import threading
import time

from kvstore.errors import RequestError
from kvstore.forks import in_child
from kvstore.plan.journal import BlockEvent, Event
from kvstore.service.client.attachment import DaemonDown, error_of
from kvstore.service.client.connection import DaemonConnection
from kvstore.service.client.link import DaemonLink
from kvstore.service.client.thread import Errand
from kvstore.service.protocol import messages
from kvstore.service.protocol.events import EventsReply
from kvstore.service.protocol.frames import Kind, ReplyStatus

log = logging.getLogger(__name__)

LISTEN_S = 5.0  # after so long without news the daemon says that there are none, and so that it lives
RETRY_S = 0.1  # between two looks whether the link has found a daemon; a look sends nothing
REFUSED_S = 30.0  # until a daemon that tells no events, as of another release, is asked again
MAX_KEYS = 1 << 18  # in the queue, 16 MB and more; an event counts as one, too


class Follower:
    """The events of the store that a link's daemon keeps for this client, from now on. `take`: any thread."""

    def __init__(self, link: DaemonLink) -> None:
        self._link = link
        self._events: list[BlockEvent] = []
        self._num_keys = 0
        self._has_told = False  # since the last DROPPED
        self._lock = threading.Lock()  # of these three
        self._errand: Errand | None = Errand("events", self._run)
        in_child(self, Follower._begin_anew)

    def take(self) -> list[BlockEvent]:
        """The news since the last call."""
        if self._errand is None:  # in a forked child
            self._errand = Errand("events", self._run)
        with self._lock:
            events, self._events, self._num_keys = self._events, [], 0
        return events

    def close(self) -> None:
        """Stop asking. After the link is closed; idempotent."""
        if self._errand is not None:
            self._errand.end()

    def _begin_anew(self) -> None:
        """In a forked child: what was told to the parent may not be so any more, and the child has to ask by itself."""
        self._lock = threading.Lock()
        self._events, self._num_keys = [BlockEvent(Event.DROPPED, time.time())], 0
        self._errand = None

    def _run(self, errand: Errand) -> None:
        pause_s = 0.0
        while not errand.rest(pause_s):
            pause_s = self._follow(errand)
            self._drop()

    def _follow(self, errand: Errand) -> float:
        """Listen until that ends; returns after how many seconds to try again."""
        try:
            with self._link.borrow(self._link.attached()) as wire:
                self._listen(errand.hold(wire))
        except DaemonDown:
            return RETRY_S
        except Exception as error:  # whatever it is, this thread must not leave anybody with what he believes
            log.warning("the daemon tells no events: %s", error)
        return REFUSED_S

    def _listen(self, wire: DaemonConnection) -> None:
        while True:
            message = messages.encode(messages.EventsCall(LISTEN_S))
            status, answer = wire.call(Kind.CALL, message, LISTEN_S + self._link.call_timeout_s)
            if status is not ReplyStatus.OK:
                raise RequestError(str(error_of(answer)))
            self._put(EventsReply.read(answer).news() if answer else [])

    def _put(self, events: list[BlockEvent]) -> None:
        num_keys = sum(1 + len(event.keys) for event in events)
        if self._num_keys + num_keys > MAX_KEYS:
            self._drop()
        with self._lock:
            self._events += events
            self._num_keys += num_keys
            self._has_told = self._has_told or bool(events)

    def _drop(self) -> None:
        with self._lock:
            if self._has_told:
                self._events, self._num_keys = [BlockEvent(Event.DROPPED, time.time())], 0
                self._has_told = False
