"""The client's part of one daemon while it is attached to it: a session, its connections, the slab."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from kvstore.codecs.loss import Loss
from kvstore.errors import ConfigError, KVStoreError, LayoutMismatch, RequestError
from kvstore.service.client.connection import DaemonConnection, Dial
from kvstore.service.client.split_slab import SplitSlab, map_slab
from kvstore.service.protocol import frames, messages
from kvstore.service.protocol.frames import Kind, ProtocolError, ReplyStatus
from kvstore.tiers.host import HostSlab
from kvstore.waits import Deadlines

EPOCH_BITS = 32  # slot numbers of attachment n are n << 32 higher than in the slab: those of two slabs never meet
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
    """One session with one daemon, and its slab. Any thread.

    sent:    request id -> keys the daemon knows of it.
    orphans: leases that may be held for this client without its knowing.
    """

    def __init__(
        self, epoch: int, answer: dict[str, Any], anchor: DaemonConnection, slab: HostSlab | SplitSlab
    ) -> None:
        self.session = str(answer["session"])
        self.namespace_id = str(answer["namespace"])
        self.deadlines = Deadlines(float(answer["lookup_deadline_s"]), float(answer["load_deadline_s"]))
        self.loss = Loss(int(answer.get("loss", 0)))
        self.slot_base = epoch << EPOCH_BITS
        self.anchor = anchor
        self.slab = slab
        self.is_isolated = isinstance(slab, SplitSlab)
        self.sent: dict[int, int] = {}
        self.orphans: list[int] = []
        self._idle: list[DaemonConnection] = []
        self._is_hung_up = False

    @property
    def is_lost(self) -> bool:
        """True if the session has ended, here or there. Does not wait."""
        return self._is_hung_up or self.anchor.is_lost

    def note_sent(self, request_id: int, num_keys: int) -> None:
        """The daemon knows this much of a request now."""
        while len(self.sent) >= MAX_SENT and request_id not in self.sent:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread makes room, too
                del self.sent[next(iter(self.sent))]
        self.sent[request_id] = num_keys

    def take(self, dial: Dial, timeout_s: float) -> DaemonConnection:
        """An idle connection, else a new one. Raises OSError or ProtocolError."""
        try:
            return self._idle.pop()
        except IndexError:
            return self.open(dial, timeout_s)

    def open(self, dial: Dial, timeout_s: float) -> DaemonConnection:
        """One more connection. Raises OSError or ProtocolError."""
        wire = dial(timeout_s)
        try:
            message = frames.encode_json({"session": self.session})
            status, _ = wire.call(Kind.ATTACH, message, timeout_s)
            if status is not ReplyStatus.OK:
                if status is ReplyStatus.GONE:
                    self.hang_up()
                raise ConnectionResetError(f"a connection of the session was answered {status.name}")
        except BaseException:
            wire.close()
            raise
        return wire

    def give(self, wire: DaemonConnection) -> None:
        """The connection is idle."""
        if self._is_hung_up or len(self._idle) >= MAX_IDLE_WIRES:
            wire.close()
        else:
            self._idle.append(wire)

    def release_orphans(self, wire: DaemonConnection, timeout_s: float) -> None:
        """Release in the daemon what it may hold in vain. Raises OSError or ProtocolError."""
        while self.orphans:
            lease_id = self.orphans[-1]
            wire.call(Kind.CALL, messages.encode(messages.ReleaseCall(lease_id)), timeout_s)
            self.orphans.remove(lease_id)  # another thread may have appended one meanwhile

    def hang_up(self) -> None:
        """Close all connections. Idempotent."""
        self._is_hung_up = True
        self.anchor.close()
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()


def greet(wire: DaemonConnection, greeting: bytes, epoch: int, timeout_s: float) -> Attachment:
    """Say hello over a new connection, which becomes the anchor of attachment number `epoch`.

    Raises DaemonDown, or ConfigError or LayoutMismatch if the daemon refuses; the connection is closed then.
    """
    fds: list[int] = []
    try:
        status, body, fds = wire.hello(greeting, timeout_s)
        if status is ReplyStatus.ERROR:
            raise error_of(body)
        answer = json.loads(body)
        return Attachment(epoch, answer, wire, _slab(fds, answer))
    except BaseException as error:
        wire.close()
        is_refusal = isinstance(error, KVStoreError) and not isinstance(error, ProtocolError)
        if is_refusal or not isinstance(error, Exception):
            raise
        raise DaemonDown(f"{type(error).__name__}: {error}") from None
    finally:
        for fd in fds:
            os.close(fd)


def error_of(answer: bytes) -> KVStoreError:
    """The exception for an answer of status ERROR."""
    value = frames.decode_json(answer)
    kind = _RAISED.get(str(value.get("type")), DaemonDown)
    return kind(str(value.get("message")))


def _slab(fds: list[int], answer: dict[str, Any]) -> HostSlab | SplitSlab:
    if not fds:
        raise ProtocolError("the daemon sent no slab")
    return map_slab(fds, int(answer["num_slots"]), int(answer["slot_bytes"]), int(answer["num_staging"]))
