"""From two rendered prompts of a conversation to the mechanism that parts them.

All from outside, by finding the messages' own text in the prompts. The messages of the old prompt are taken to be the
first ones of the new: what a client changed itself is `changes`' to say.

    old  = [history ......................][generation prompt]
    base = [history ......................]                      the same without a generation prompt
    new  = [history ......................][answer][next user message][generation prompt]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.prefix import mechanisms
from kvstore.prefix.difference import common_chars
from kvstore.prefix.mechanisms import Mechanism

YES, NO, DEPENDS, UNKNOWN = "yes", "no", "depends", "unknown"
KEPT, TAIL, INSIDE = "kept", "tail", "inside"
PROBE_CHARS = 48  # of a message's text, to find it by; longer would be cut by templates that wrap lines
MIN_ORDER_CHARS = 12  # a shorter text may stand anywhere ("yes")
RESYNC_CHARS = 400  # a block of empty thinking is shorter
_THINK = re.compile(r"think|reason|thought|analysis|channel", re.IGNORECASE)
_INLINE = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_CLOSED = re.compile(r"</|\bend|/think|<\|END", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of text that a message or a tool brings into a prompt. what: content, reasoning, call or tool."""

    index: int
    role: str
    what: str
    text: str


@dataclass(frozen=True, slots=True)
class PrefixExplanation:
    """What became of an old prompt in the new one.

    outcome:   KEPT whole, only its TAIL lost (the generation prompt), or changed INSIDE.
    mechanism: None if nothing is wrong.
    place:     the message that the first difference lies in; "" where there is none.
    answer:    whether the generated tokens stand right behind the old prompt: YES, NO, DEPENDS on what the model
               writes itself (`between` has it), or UNKNOWN.
    """

    outcome: str
    mechanism: Mechanism | None
    place: str
    answer: str
    between: str = ""


def explain(
    old: str,
    new: str,
    base: str,
    old_messages: Sequence[Mapping[str, Any]],
    new_messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> PrefixExplanation:
    """Name what parts `old` and `new`. base: `old` rendered without a generation prompt."""
    at = common_chars(old, new)
    items = items_of(old_messages, tools)
    if at == len(old):
        return _behind(new[at:], new_messages[len(old_messages) :])
    if len(base) < len(old) and old.startswith(base) and at >= len(base):
        return PrefixExplanation(TAIL, mechanisms.GENERATION_PROMPT, "generation prompt", NO)
    if at >= max((start + len(item.text) for item in items if (start := old.rfind(item.text)) >= 0), default=len(old)):
        # Behind all that was said: a generation prompt too, of a template that does not tell where it begins.
        return PrefixExplanation(INSIDE, mechanisms.GENERATION_PROMPT, "generation prompt", NO)
    return PrefixExplanation(INSIDE, _inside(old, new, at, items, old_messages), place_of(old, at, items), NO)


def items_of(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[Item]:
    """Return what can be found of messages and tools in a prompt."""
    found = [Item(-1, "tools", "tool", str(_function(tool).get("name", ""))) for tool in tools[:1]]
    for index, message in enumerate(messages):
        role = str(message.get("role", ""))
        reasoning, content = thought_and_said(message)
        found += [Item(index, role, what, text) for what, text in (("reasoning", reasoning), ("content", content))]
        found += [Item(index, role, "call", call_probe(call)) for call in message.get("tool_calls") or ()]
    return [item for item in found if item.text]


def thought_and_said(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return a message's reasoning, from a field or inside its content, and the rest of its content."""
    content = text_of(message.get("content"))
    names = ("reasoning_content", "reasoning", "thinking")
    reasoning = next((str(message[name]) for name in names if message.get(name)), "")
    inline = _INLINE.search(content) if message.get("role") == "assistant" else None
    if inline:
        reasoning, content = reasoning or inline[1], content[inline.end() :]
    return reasoning.strip(), content.strip()


def text_of(content: Any) -> str:
    """Return the text of a message's content: a text, or parts of one."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def call_probe(call: Any) -> str:
    """Return the name of the function that a message calls."""
    return str(_function(call).get("name", ""))


def place_of(text: str, at: int, items: Sequence[Item]) -> str:
    """Return the message in which the character `at` of a prompt lies, such as "message 3 (assistant, reasoning)"."""
    best, best_start, cursor = None, -1, 0
    for item in sorted(items, key=lambda item: item.index):
        start = text.find(probe(item.text), cursor if item.index >= 0 else 0)
        if start < 0:
            start = text.find(probe(item.text))
        if best_start < start <= at:
            best, best_start = item, start
        cursor = max(cursor, start) if item.index >= 0 and start <= at else cursor
    if best is None:
        return "before the first message"
    where = "tools" if best.index < 0 else f"message {best.index + 1} ({best.role}{_detail(best.what)})"
    return where if at < best_start + len(best.text) else f"behind {where}"


def probe(text: str) -> str:
    """Return the beginning of a text, by which it is found in a prompt."""
    return text.strip().split("\n", 1)[0][:PROBE_CHARS].strip()


def shows(text: str, item: str) -> bool:
    """Return whether a prompt has a text."""
    return probe(item) in text


def _behind(rest: str, added: Sequence[Mapping[str, Any]]) -> PrefixExplanation:
    """Explain a prompt that is kept: is the answer right behind it?"""
    if not added or added[0].get("role") != "assistant":
        return PrefixExplanation(KEPT, None, "", UNKNOWN)
    reasoning, content = thought_and_said(added[0])
    calls = [call_probe(call) for call in added[0].get("tool_calls") or ()]
    until = rest
    if len(added) > 1:  # what another message has is not the answer's
        follower = probe(text_of(added[1].get("content")))
        until = rest[: rest.find(follower)] if follower and follower in rest else rest
    if reasoning:
        start = until.find(probe(reasoning))
        if start < 0:
            return PrefixExplanation(KEPT, mechanisms.REASONING_DROPPED, "", NO)
        gap = until[:start]
        return PrefixExplanation(KEPT, None, "", YES if not _CLOSED.search(gap) else DEPENDS, gap)
    if content:
        start = until.find(probe(content))
        if start < 0:
            return PrefixExplanation(KEPT, mechanisms.ANSWER_CHANGED, "", NO)
        gap = until[:start]
        raw = text_of(added[0].get("content"))
        if not gap or until.startswith(raw[: len(gap) + 1]):
            return PrefixExplanation(KEPT, None, "", YES)
        return PrefixExplanation(KEPT, mechanisms.TAG_BETWEEN, "", DEPENDS, gap)
    if calls:
        gap = until[: max(0, until.find(calls[0]))]
        if _THINK.search(gap) and _CLOSED.search(gap):
            return PrefixExplanation(KEPT, mechanisms.TAG_BETWEEN, "", DEPENDS, gap)
    return PrefixExplanation(KEPT, None, "", UNKNOWN)


def _inside(old: str, new: str, at: int, items: Sequence[Item], old_messages: Sequence[Mapping[str, Any]]) -> Mechanism:
    if _moves(old, new, [item for item in items if item.what == "tool"], items):
        return mechanisms.TOOLS_MOVE
    if _moves(old, new, [item for item in items if item.role in ("system", "developer")], items):
        return mechanisms.SYSTEM_MOVES
    dropped = [
        item for item in items if item.what == "reasoning" and shows(old, item.text) and not shows(new, item.text)
    ]
    if dropped:
        last_user = max((i for i, message in enumerate(old_messages) if message.get("role") == "user"), default=-1)
        in_loop = dropped[0].index > last_user
        return mechanisms.LOOP_REASONING_DROPPED if in_loop else mechanisms.NEWEST_REASONING_ONLY
    changed = _changed(old, new, at)
    if _THINK.search(changed):
        return mechanisms.EMPTY_THINKING
    first = min((start for item in items if (start := old.find(probe(item.text))) >= 0), default=0)
    if at < first and re.search(r"\d", changed):
        return mechanisms.DATE
    return mechanisms.HISTORY_CHANGED


def _moves(old: str, new: str, moving: Sequence[Item], items: Sequence[Item]) -> bool:
    """Return whether more messages stand before `moving` in the new prompt than in the old."""
    if not moving:
        return False
    others = [
        item for item in items if item.what == "content" and item not in moving and len(item.text) >= MIN_ORDER_CHARS
    ]

    def rank(text: str) -> int | None:
        start = text.find(probe(moving[0].text))
        if start < 0:
            return None
        return sum(0 <= text.find(probe(item.text)) < start for item in others)

    before, after = rank(old), rank(new)
    return before is not None and after is not None and after > before


def _changed(old: str, new: str, at: int) -> str:
    """Return the text that only one of the prompts has where they part, with the marker that it may begin in."""
    for one, other in ((old, new), (new, old)):
        ahead = other[at : at + 24]
        found = one.find(ahead, at + 1, at + RESYNC_CHARS) if len(ahead) == 24 else -1
        if found > 0:
            return one[max(0, at - 12) : found]
    return old[max(0, at - 12) : at + 24] + new[at : at + 24]


def _detail(what: str) -> str:
    return {"content": "", "reasoning": ", reasoning", "call": ", tool call"}.get(what, "")


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}
