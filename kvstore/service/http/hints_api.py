"""The HTTP API's door for KV hints: what is known of prompts, told without a request (during a tool call, say)."""

from __future__ import annotations

import asyncio

from kvstore.errors import RequestError
from kvstore.hinting import Aimed, aim
from kvstore.hints.actions import HintAction
from kvstore.hints.envelope import parse, refusal
from kvstore.hints.outcome import HintOutcome
from kvstore.plan.records import Request, RequestOptions
from kvstore.requests import RequestMaker
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.http import scope
from kvstore.service.http.answers import HintsAnswer, OutcomeAnswer
from kvstore.service.http.models import HintsBody
from kvstore.service.http.routes import ApiCall, Route
from kvstore.service.protocol.messages import KEY_BYTES
from radix.hashing import BlockHash

LARGE_HINT = 64 << 10  # bytes; the tokens of a longer one are hashed beside the event loop


class HintsApi:
    """The operation on hints. The daemon's event loop only."""

    def __init__(self, state: DaemonState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        """Its part of the table."""
        return [
            Route("POST", "/v1/hints", self.hints, "What is known of the future of prompts.", body=HintsBody,
                  answer=HintsAnswer, errors=(404, 409)),
        ]  # fmt: skip

    async def hints(self, call: ApiCall) -> HintsAnswer:
        body: HintsBody = call.body
        opened = scope.one(self._state.stores, call, body.namespace)
        size = call.num_bytes
        if size > opened.store.hint_limits.max_bytes:
            items: list[Aimed | HintOutcome] = [refusal(size, opened.store.hint_limits)]
        elif size < LARGE_HINT:
            items = _aimed(opened, body)
        else:
            items = await asyncio.to_thread(_aimed, opened, body)
        outcomes: list[HintOutcome] = []
        for item in items:
            if isinstance(item, HintOutcome):
                opened.store.count_hints([item])
                outcomes.append(item)
            else:
                outcomes.append(opened.store.obey(item.request, item.wish))
            await asyncio.sleep(0)  # others of the event loop have their turn between two actions
        return HintsAnswer(message_id=body.message_id, outcomes=[_answer(outcome) for outcome in outcomes])


def _aimed(opened: OpenStore, body: HintsBody) -> list[Aimed | HintOutcome]:
    limits, block_size = opened.store.hint_limits, opened.layout.block_size
    maker = RequestMaker(opened.namespace)
    maker.loss = opened.store.loss

    def named(action: HintAction) -> Request:
        if action.tokens is not None:
            keys = maker.request(action.tokens).keys
        else:
            keys = [BlockHash(key) for key in action.hashes or ()]
            if any(len(key) != KEY_BYTES for key in keys):
                raise RequestError(f"block_hashes must have {2 * KEY_BYTES} digits each")
        return opened.new_request(opened.bind(keys), len(keys) * block_size + 1, RequestOptions())

    message = {
        "protocol_version": body.protocol_version,
        "message_id": body.message_id,
        "actions": body.actions,
    }
    return [
        aim(item, block_size, named, None, limits) if isinstance(item, HintAction) else item
        for item in parse(message, limits).items
    ]


def _answer(outcome: HintOutcome) -> OutcomeAnswer:
    return OutcomeAnswer(
        action_id=outcome.action_id,
        action=outcome.action,
        status=outcome.status.value,
        tokens=outcome.tokens,
        until=outcome.until,
        reason=outcome.reason,
    )
