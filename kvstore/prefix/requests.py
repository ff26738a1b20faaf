"""OpenAI-style requests, as a log or a server has them: what of each matters to a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import RequestError

MAX_LINE_BYTES = 32 << 20
MAX_MESSAGES, MAX_TOOLS = 100_000, 10_000
_KWARGS = ("reasoning_effort", "enable_thinking", "thinking")
_LINK_CHARS = 2000  # of the first user message, by which requests without a session are put together


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request. Either messages, or a prompt: a text or token ids.

    session: as the client named it, else made from the first user message, which a conversation keeps.
    kwargs:  of the chat template.
    """

    session: str
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | Sequence[int] | None = None

    @property
    def shape(self) -> str:
        """The kind of conversation, for grouping: "chat", "tool loop, reasoning", "completion" ..."""
        if self.prompt is not None:
            return "completion"
        roles = {message.get("role") for message in self.messages}
        name = "tool loop" if "tool" in roles else "chat with tools" if self.tools else "chat"
        thinks = any(message.get("reasoning_content") or message.get("reasoning") for message in self.messages)
        inline = any("<think>" in str(m.get("content")) for m in self.messages if m.get("role") == "assistant")
        return name + (", reasoning" if thinks else ", <think> in content" if inline else "")


def parse(value: Any) -> ChatRequest:
    """Read a request; one that is wrapped in "body" or "request" is unwrapped. Raises RequestError with the reason."""
    for wrapper in ("body", "request"):
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = {**value[wrapper], **{key: value[key] for key in ("session", "session_id") if key in value}}
    if not isinstance(value, dict):
        raise RequestError("it is no JSON object")
    if "messages" in value:
        messages = _objects(value, "messages", MAX_MESSAGES)
        if not messages:
            raise RequestError("messages is empty")
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise RequestError("a message has no role")
        kwargs = value.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise RequestError("chat_template_kwargs is no object")
        kwargs = {**{name: value[name] for name in _KWARGS if value.get(name) is not None}, **kwargs}
        tools = _objects(value, "tools", MAX_TOOLS) if value.get("tools") else []
        return ChatRequest(_session(value) or _link(messages), messages, tools, kwargs)
    prompt = value.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return ChatRequest(_session(value) or _hash(prompt[:200]), prompt=prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int and abs(token) < 2**62 for token in prompt):
        return ChatRequest(_session(value) or _hash(json.dumps(prompt[:32])), prompt=prompt)
    raise RequestError("it has neither messages nor a prompt of text or token ids")


def read_log(lines: Iterable[bytes]) -> Iterator[tuple[int, ChatRequest | str]]:
    """Yield each line's number with its request, or with the reason why it is none. Empty lines are left out."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE_BYTES:
                raise RequestError(f"it has {len(line)} bytes; no more than {MAX_LINE_BYTES} are read")
            yield number, parse(json.loads(line))
        except RequestError as error:
            yield number, str(error)
        except (ValueError, RecursionError) as error:
            yield number, f"it is not JSON: {str(error)[:120]}"


def _objects(value: Mapping[str, Any], name: str, most: int) -> list[Mapping[str, Any]]:
    found = value[name]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise RequestError(f"{name} is no list of objects")
    if len(found) > most:
        raise RequestError(f"{name} has {len(found)} entries; no more than {most} are read")
    return found


def _session(value: Mapping[str, Any]) -> str:
    extension = value.get("kvstore")
    metadata = value.get("metadata")
    for place in (extension, metadata, value):
        if isinstance(place, dict):
            for name in ("session", "session_id", "conversation_id"):
                if isinstance(place.get(name), str) and place[name]:
                    tenant = place.get("tenant") if isinstance(place.get("tenant"), str) else ""
                    return f"{tenant}/{place[name]}"[:512]
    return ""


def _link(messages: Sequence[Mapping[str, Any]]) -> str:
    first = next((message for message in messages if message.get("role") == "user"), messages[0])
    return _hash(json.dumps(first.get("content"), sort_keys=True)[:_LINK_CHARS])


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
