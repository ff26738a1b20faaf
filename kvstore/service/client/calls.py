"""Calls of a client's store to its daemon, each bringing only the keys that are new there.

The hard thing: a call whose answer never came may have granted a lease. The number of such an *orphan* is kept with the
attachment, and released before anything else is asked of that daemon (the link's seeker does that). An attachment that
is lost takes its orphans along: the daemon has released them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvstore.plan.records import Request
from kvstore.service.client.attachment import Attachment, DaemonDown
from kvstore.service.client.link import DaemonLink
from kvstore.service.protocol import messages
from kvstore.service.protocol.frames import ProtocolError, ReplyStatus
from kvstore.service.protocol.messages import PIECE_KEYS, Call, RequestPart
from kvstore.service.protocol.replies import NumberReply

log = logging.getLogger(__name__)


class Calls:
    """Calls over a link. Any thread."""

    def __init__(self, link: DaemonLink) -> None:
        self._link = link

    def ask(
        self, request: Request, make: Callable[[RequestPart], Call], wait_s: float = 0.0
    ) -> tuple[Attachment, bytes]:
        """A call about a request. make: gives the call for the part that names the request."""
        return self._ask(self._link.attached(), request, make, wait_s)

    def prepare(
        self,
        kind: Callable[[RequestPart, int, int, int, str], messages.PrepareLoadCall | messages.PrepareSaveCall],
        request: Request,
        lease_id: int,
        first: int,
        end: int,
        owner: str,
    ) -> tuple[Attachment, bytes]:
        """Ask for a lease of blocks [first, end)."""
        attachment = self._link.attached()  # the one that may grant: another may have come since the last call
        try:
            return self._ask(attachment, request, lambda part: kind(part, lease_id, first, end, owner))
        except DaemonDown:
            self._link.orphan(attachment, lease_id)
            raise

    def number(self, request: Request, make: Callable[[RequestPart], Call]) -> int:
        """A call that is answered by a number; 0 if there is no daemon, or no number in the answer."""
        try:
            _, answer = self.ask(request, make)
            return NumberReply.read(answer).number if answer else 0
        except (DaemonDown, ProtocolError):
            return 0

    def tell(self, call: Call) -> None:
        """A call whose answer nobody waits for."""
        try:
            self._link.call(self._link.attached(), call)
        except DaemonDown:
            log.debug("%s was not told to the daemon", type(call).__name__)

    def unsend(self, request: Request) -> None:
        """The daemon has forgotten this request: its keys go along if it is named again."""
        attachment = self._link.attachment
        if attachment is not None:
            attachment.sent.pop(request.id, None)

    def _ask(
        self, attachment: Attachment, request: Request, make: Callable[[RequestPart], Call], wait_s: float = 0.0
    ) -> tuple[Attachment, bytes]:
        if len(request.keys) > messages.MAX_KEYS:
            raise messages.too_long(len(request.keys))
        base = min(attachment.sent.get(request.id, 0), len(request.keys))
        status, answer = self._send(attachment, request, base, make, wait_s)
        if status is ReplyStatus.RESEND:
            status, answer = self._send(attachment, request, 0, make, wait_s)
        if status is not ReplyStatus.OK:
            raise DaemonDown(f"a call was answered {status.name}")
        return attachment, answer

    def _send(
        self,
        attachment: Attachment,
        request: Request,
        base: int,
        make: Callable[[RequestPart], Call],
        wait_s: float,
    ) -> tuple[ReplyStatus, bytes]:
        """Bring the keys from `base` on, in pieces if there are many, and the call with the last of them."""
        num_keys = len(request.keys)
        while num_keys - base > PIECE_KEYS:
            part = messages.part_of(request, base, base + PIECE_KEYS)
            status, answer = self._link.call(attachment, messages.KeysCall(part))
            if status is not ReplyStatus.OK:
                return status, answer
            base += PIECE_KEYS
            attachment.note_sent(request.id, base)
        part = messages.part_of(request, base, num_keys)
        status, answer = self._link.call(attachment, make(part), wait_s)
        if status is ReplyStatus.OK:
            attachment.note_sent(request.id, num_keys)
        return status, answer
