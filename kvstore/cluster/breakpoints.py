"""Anthropic's breakpoints as KV hints: what lies before each of them is retained for as long as it says.

    {"type": "text", "text": "...", "cache_control": {"type": "ephemeral", "ttl": "1h"}}

The hard thing: a chat template decides what tokens a message becomes, and where they stand. So the place of a
breakpoint in a prompt is found by making the prompt once more, of a conversation that goes on with other text from
there on: up to the breakpoint the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvstore import logs
from kvstore.cluster.messages import ChatMessage

log = logs.limited(__name__)

TTL_S = {"5m": 300.0, "1h": 3600.0}
OTHER_TEXT = ("#", "@")  # one of them is not what goes on at the breakpoint

Encode = Callable[[list[dict[str, str]]], list[int]]


def hint_of(messages: Sequence[ChatMessage], tokens: Sequence[int], encode: Encode) -> dict[str, Any] | None:
    """Return the message of hints that the breakpoints of a conversation are; None without breakpoints.

    tokens: the prompt that `encode` makes of the conversation. It is called once for each breakpoint.

    A breakpoint that the template leaves no trace of is one of an empty range, which is an outcome of its own.
    """
    actions = []
    for name, ttl_s, other in _others(messages):
        try:
            end = _common(tokens, encode(other))
        except Exception as error:  # a template may refuse any text; the conversation itself it has taken
            log.info("%s cannot be placed: %s", name, type(error).__name__)
            end = 0
        payload = {"end": end, "ttl_s": ttl_s}
        actions.append({"action_id": name, "action_type": "retain", "action_version": "1.0", "payload": payload})
    return {"protocol_version": "1.0", "message_id": "cache_control", "actions": actions} if actions else None


def _others(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, float, list[dict[str, str]]]]:
    """Each breakpoint with its name, its time to live, and the conversation with other text behind it."""
    plain = [message.plain for message in messages]
    for place, message in enumerate(messages):
        text = plain[place]["content"]
        for part, end, control in message.breakpoints:
            other = next(mark for mark in OTHER_TEXT if not text.startswith(mark, end))
            changed = {**plain[place], "content": text[:end] + other}
            name = f"messages[{place}].content[{part}].cache_control"
            yield name, TTL_S[control.ttl], [*plain[:place], changed, *plain[place + 1 :]]


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with; 0 if they are the same, as nothing of the breakpoint is in them then."""
    most = min(len(tokens), len(others))
    differs = np.flatnonzero(np.asarray(tokens[:most]) != np.asarray(others[:most]))
    if len(differs):
        return int(differs[0])
    return most if len(tokens) != len(others) else 0
