"""One hash over fixed renderings: two servers with different ones make different prompts of the same conversation.

The same template gives other text in another engine or version (with tools, three engines agreed on 4 of 70 templates),
and then nothing that one server has saved is found by the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from kvstore.prefix import shapes
from kvstore.prefix.shapes import ChatPrompt, Message

VERSION = b"1"  # of the conversations: another set gives other hashes
DATES = ("%d %b %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m-%d", "%d/%m/%Y", "%H:%M:%S", "%H:%M")  # as templates write today
REFUSED = "refused: "


def fingerprint(
    render: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str], now: datetime
) -> str:
    """Return 16 hexadecimal digits of what `render(messages, tools)` gives for the fixed conversations.

    now: today's date is left out, so that servers that were started on different days can be compared. A rendering that
    raises counts by the class of its error.
    """
    total = hashlib.sha256(VERSION)
    for prompt in _prompts():
        try:
            text = render(prompt.messages, prompt.tools)
        except Exception as error:  # an engine may raise anything; that it does is part of the answer
            text = f"{REFUSED}{type(error).__name__}"
        for form in DATES:
            text = text.replace(now.strftime(form), "<date>")
        total.update(len(text).to_bytes(8, "little") + text.encode(errors="surrogatepass"))
    return total.hexdigest()[:16]


def _prompts() -> list[ChatPrompt]:
    """Return the last prompt of each shape, and one with what engines write differently: numbers, quotes, letters."""
    arguments: Message = {"share": 1.0, "none": None, "text": "<b>'é'</b> & \"x\"", "deep": {"z": [], "a": {}}}
    call = {"id": "call00001", "type": "function", "function": {"name": "harbour_odd", "arguments": arguments}}
    parameters = {"type": "object", "properties": {"share": {"type": "number", "default": 1.0}}, "required": []}
    odd = {"name": "harbour_odd", "description": "It's <odd> & Größe.", "parameters": parameters}
    messages: list[Message] = [
        shapes.user(0),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "harbour_odd", "tool_call_id": "call00001", "content": '{"ok": 1.0}'},
    ]
    tool: Message = {"type": "function", "function": odd}
    return [*(shape.prompts[-1] for shape in shapes.shapes()), ChatPrompt(messages, [tool])]
