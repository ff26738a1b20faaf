"""The part of a daemon client that takes hints: wishes go to the daemon, one call for each prompt they are about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kvstore.hinting import Aimed
from kvstore.hints.outcome import HintOutcome, HintStatus
from kvstore.service.client.attachment import DaemonDown
from kvstore.service.client.calls import Calls
from kvstore.service.protocol.frames import ProtocolError
from kvstore.service.protocol.messages import HintCall, OutcomePart, RequestPart, WishPart
from kvstore.service.protocol.replies import OutcomesReply

NO_DAEMON = "the daemon does not answer"


class HintCalls:
    """Hints over a link. Any thread."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def carry_out(self, items: Sequence[Aimed | HintOutcome]) -> list[HintOutcome]:
        """Do what was aimed; returns the outcomes of all, in this order. Without a daemon, actions are rejected."""
        ended = [OutcomePart.of(item) for item in items if isinstance(item, HintOutcome)]
        outcomes: list[HintOutcome] = []
        for _, group in groupby(items, key=_request_id):
            members = list(group)
            aimed = [item for item in members if isinstance(item, Aimed)]
            if aimed:
                outcomes += self._ask(aimed, ended)
                ended = []
            else:
                outcomes += [item for item in members if isinstance(item, HintOutcome)]
        if ended:
            self._calls.tell(HintCall(None, [], ended))
        return outcomes

    def _ask(self, aimed: Sequence[Aimed], ended: list[OutcomePart]) -> list[HintOutcome]:
        """Ask about one request."""
        request = aimed[0].request
        wishes = [WishPart.of(one.wish) for one in aimed]

        def call(part: RequestPart) -> HintCall:
            return HintCall(part, wishes, ended)

        try:
            _, answer = self._calls.ask(request, call)
            outcomes = [part.outcome() for part in OutcomesReply.read(answer).outcomes]
        except (DaemonDown, ProtocolError):
            outcomes = []
        finally:
            if not aimed[0].wish.is_own:
                self._calls.unsend(request)
        if len(outcomes) != len(aimed):
            return [one.wish.outcome(HintStatus.REJECTED, reason=NO_DAEMON) for one in aimed]
        return outcomes


def _request_id(item: Aimed | HintOutcome) -> int:
    return item.request.id if isinstance(item, Aimed) else 0
