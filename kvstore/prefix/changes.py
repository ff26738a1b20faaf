"""What a client changed between two requests of a conversation, beside adding to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.prefix import mechanisms
from kvstore.prefix.mechanisms import Mechanism
from kvstore.prefix.requests import ChatRequest

_NUMBERS = re.compile(r"\d+|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun|Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\w*\b")


def client_change(old: ChatRequest, new: ChatRequest) -> Mechanism | None:
    """Return the first change from the prompt's start on; None if the new request only adds messages."""
    if old.prompt is not None or new.prompt is not None:
        return _of_prompts(old.prompt, new.prompt)
    if old.kwargs != new.kwargs:
        return mechanisms.SWITCH
    if list(old.tools) != list(new.tools) or _text(old.tools) != _text(new.tools):
        return _of_tools(old.tools, new.tools)
    at = next((i for i, (one, other) in enumerate(zip(old.messages, new.messages, strict=False)) if one != other), None)
    if at is None:
        return None if len(new.messages) > len(old.messages) else mechanisms.TURN_REPEATED
    return _of_messages(old.messages, new.messages, at)


def _of_prompts(old: str | Sequence[int] | None, new: str | Sequence[int] | None) -> Mechanism | None:
    if old is None or new is None or type(old) is not type(new):
        return mechanisms.TEXT_CHANGED
    if new[: len(old)] == old:
        return None if len(new) > len(old) else mechanisms.TURN_REPEATED
    if isinstance(old, str) and isinstance(new, str) and _NUMBERS.sub("0", new).startswith(_NUMBERS.sub("0", old)):
        return mechanisms.DATE
    return mechanisms.TEXT_CHANGED


def _of_tools(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Mechanism:
    if json.dumps(list(old), sort_keys=True) == json.dumps(list(new), sort_keys=True):
        return mechanisms.KEY_ORDER
    return mechanisms.TOOLS_FIRST if old and list(new[: len(old)]) == list(old) else mechanisms.TOOLS_CHANGED


def _of_messages(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], at: int) -> Mechanism:
    if {old[at].get("role"), new[at].get("role")} & {"system", "developer"}:
        same = _NUMBERS.sub("0", str(old[at].get("content"))) == _NUMBERS.sub("0", str(new[at].get("content")))
        return mechanisms.DATE if same and new[at].get("role") == old[at].get("role") else mechanisms.SYSTEM_CHANGED
    if any(message == new[at] for message in old[at + 1 :]):
        return mechanisms.HISTORY_CUT
    if at == len(old) - 1 and old[at].get("role") == "user":
        return mechanisms.TURN_REPEATED
    return mechanisms.HISTORY_EDITED


def _text(tools: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(tools))  # equal objects may differ in the order of their keys, and prompts with them
