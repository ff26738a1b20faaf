"""A client's tie to its daemon: attached, or not for the moment.

    DOWN ----- hello answered -----> ATTACHED          at most one try per back-off, by whichever call comes next
    ATTACHED - a call timed out ---> PAUSED            the session stays; calls fail at once until the back-off is over
    PAUSED --- a call is answered -> ATTACHED
    ATTACHED, PAUSED - the daemon hung up --> DOWN     leases of that session are void

No call waits longer than its deadline, and while the daemon is known not to answer none waits at all. There is no
thread here: what has to be tried again is tried by the next call.

The hard thing: a session may only be given up by the client while it holds no lease, for the daemon hands the slots of
a lost session to others, and somebody here may be copying from one. So a call that times out costs its connection but
not the session. A daemon that is gone gives slots to nobody: the memory stays as it was for as long as it is mapped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from kvstore.errors import ConfigError, KVStoreError, LayoutMismatch, RequestError
from kvstore.service import protocol
from kvstore.service.protocol import Op, ProtocolError, Status
from kvstore.service.wire import Dial, Wire
from kvstore.tiers.host import HostSlab, SlabHandle

log = logging.getLogger(__name__)

EPOCH_BITS = 32  # slot numbers of attachment n are n << 32 higher than in the slab: those of two slabs never meet
FIRST_BACKOFF_S = 0.05
MAX_IDLE_WIRES = 64
MAX_SENT = 16_384

_RAISED: dict[str, type[KVStoreError]] = {
    "RequestError": RequestError,
    "ConfigError": ConfigError,
    "LayoutMismatch": LayoutMismatch,
}


class DaemonDown(KVStoreError):
    """The daemon did not answer, or not in time. Never leaves the client: it becomes a miss."""


class Attachment:
    """One session with one daemon, and its slab, which a daemon on another machine cannot share. Any thread.

    sent:    request id -> keys the daemon knows of it.
    orphans: leases that may have been granted in an answer that never came.
    """

    def __init__(self, epoch: int, answer: dict[str, Any], anchor: Wire, slab: HostSlab | None) -> None:
        self.session = str(answer["session"])
        self.namespace_id = str(answer["namespace"])
        self.lookup_deadline_s = float(answer["lookup_deadline_s"])
        self.load_deadline_s = float(answer["load_deadline_s"])
        self.slot_base = epoch << EPOCH_BITS
        self.anchor = anchor
        self.slab = slab
        self.sent: dict[int, int] = {}
        self.orphans: list[int] = []
        self.idle: list[Wire] = []
        self.is_lost = False

    def note_sent(self, request_id: int, num_keys: int) -> None:
        """The daemon knows this much of a request now."""
        while len(self.sent) >= MAX_SENT and request_id not in self.sent:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread makes room, too
                del self.sent[next(iter(self.sent))]
        self.sent[request_id] = num_keys

    def hang_up(self) -> None:
        """Close all connections. Idempotent."""
        self.is_lost = True
        self.anchor.close()
        while self.idle:
            with contextlib.suppress(IndexError):
                self.idle.pop().close()


class Link:
    """Calls to a daemon, with deadlines and re-attaching. Any thread.

    dial:      makes a connection; raises OSError.
    greeting:  the hello message.
    on_change: told with the new attachment, or None when one is lost. Under no lock.
    """

    def __init__(
        self,
        dial: Dial,
        greeting: bytes,
        *,
        call_timeout_s: float,
        retry_max_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.call_timeout_s = call_timeout_s
        self.attachment: Attachment | None = None
        self.num_attached = 0
        self.num_failures = 0
        self._dial = dial
        self._greeting = greeting
        self._retry_max_s = retry_max_s
        self._now = now
        self._backoff_s = 0.0
        self._down_until = 0.0
        self._is_closed = False
        self._attaching = threading.Lock()  # held by the one thread that says hello; the others go on without
        _links.add(self)

    def attach(self, timeout_s: float) -> Attachment:
        """The attachment there is, else a new one. Raises DaemonDown; ConfigError or LayoutMismatch if refused."""
        attachment = self.attachment
        if attachment is not None and not attachment.is_lost:
            if self._now() < self._down_until:
                raise DaemonDown("the daemon has not answered lately")
            return attachment
        if self._is_closed:
            raise DaemonDown("the link is closed")
        if self._now() < self._down_until or not self._attaching.acquire(blocking=False):
            raise DaemonDown("the daemon is not reached at the moment")
        try:
            attachment = self._hello(timeout_s)
        except ProtocolError as error:
            self._pause(str(error))
            raise DaemonDown(str(error)) from None
        except KVStoreError as error:
            self._pause(str(error))
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._pause(f"{type(error).__name__}: {error}")
            raise DaemonDown(str(error)) from None
        finally:
            self._attaching.release()
        log.info("attached to the daemon, session %s...", attachment.session[:8])
        return attachment

    def call(self, attachment: Attachment, op: Op, body: bytes, wait_s: float = 0.0) -> tuple[Status, bytes]:
        """One call within `wait_s` and the call timeout.

        Raises DaemonDown, or RequestError if the daemon says that the caller is wrong.
        """
        with self.borrow(attachment) as wire:
            status, answer = wire.call(op, body, wait_s + self.call_timeout_s)
        if status is Status.ERROR:
            raise _error(answer)
        return status, answer

    @contextlib.contextmanager
    def borrow(self, attachment: Attachment) -> Iterator[Wire]:
        """A connection for a while. After an error it is closed, and DaemonDown raised."""
        wire: Wire | None = None
        try:
            wire = self._take(attachment)
            yield wire
        except (OSError, ProtocolError) as error:
            if wire is not None:
                wire.close()
            self._failed(attachment, error)
            raise DaemonDown(str(error)) from None
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        self._give(attachment, wire)
        self._backoff_s = 0.0

    def close(self) -> None:
        """Hang up; the daemon releases what was leased. Idempotent."""
        self._is_closed = True
        attachment, self.attachment = self.attachment, None
        if attachment is not None:
            attachment.hang_up()

    def forget(self) -> None:
        """In a forked child: the connections are the parent's, and must end with it."""
        self.close()
        self._is_closed = False
        self._attaching = threading.Lock()

    # ---- private ------------------------------------------------------------------------------------------------

    def _hello(self, timeout_s: float) -> Attachment:
        wire = self._dial(min(timeout_s, self.call_timeout_s))
        fd: int | None = None
        try:
            status, body, fd = wire.hello(self._greeting, timeout_s)
            if status is Status.ERROR:
                raise _error(body)
            answer = json.loads(body)
            slab = self._slab(fd, answer) if wire.is_local else None
            attachment = Attachment(self.num_attached, answer, wire, slab)
        except BaseException:
            wire.close()
            raise
        finally:
            if fd is not None:
                os.close(fd)
        self.num_attached += 1
        self._backoff_s = 0.0
        self.attachment = attachment
        return attachment

    def _slab(self, fd: int | None, answer: dict[str, Any]) -> HostSlab:
        if fd is None:
            raise ProtocolError("the daemon sent no slab")
        return HostSlab.attach(SlabHandle(f"/proc/self/fd/{fd}", int(answer["num_slots"]), int(answer["slot_bytes"])))

    def _take(self, attachment: Attachment) -> Wire:
        try:
            return attachment.idle.pop()
        except IndexError:
            pass
        if attachment.is_lost:
            raise ConnectionResetError("the daemon hung up")
        wire = self._dial(self.call_timeout_s)
        try:
            message = protocol.encode_json({"session": attachment.session})
            status, _ = wire.call(Op.ATTACH, message, self.call_timeout_s)
        except BaseException:
            wire.close()
            raise
        if status is not Status.OK:
            wire.close()
            self._lose(attachment, "the daemon does not know this session")
            raise ConnectionResetError("the session is gone")
        return wire

    def _give(self, attachment: Attachment, wire: Wire) -> None:
        if attachment.is_lost or len(attachment.idle) >= MAX_IDLE_WIRES:
            wire.close()
        else:
            attachment.idle.append(wire)

    def _failed(self, attachment: Attachment, error: Exception) -> None:
        self.num_failures += 1
        if attachment.is_lost or attachment.anchor.is_lost:
            self._lose(attachment, str(error))
        else:
            self._pause(str(error))

    def _lose(self, attachment: Attachment, reason: str) -> None:
        if self.attachment is attachment:
            self.attachment = None
        attachment.hang_up()
        self._pause(reason)

    def _pause(self, reason: str) -> None:
        if not self._backoff_s and not self._is_closed:
            log.warning("the daemon is down, everything is a miss: %s", reason)
        self._backoff_s = min(self._retry_max_s, max(FIRST_BACKOFF_S, 2 * self._backoff_s))
        self._down_until = self._now() + self._backoff_s


def _error(answer: bytes) -> KVStoreError:
    value = protocol.decode_json(answer)
    kind = _RAISED.get(str(value.get("type")), DaemonDown)
    return kind(str(value.get("message")))


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link.forget()


os.register_at_fork(after_in_child=_after_fork)
