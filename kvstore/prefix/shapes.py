"""The conversations that a template is tried on: each a row of prompts, one for every answer of the model.

Every message has a sentence that no other has, so that it can be found again in a rendered prompt. Answers, results and
reasoning have the lengths that agents have; the shares in a report depend on them, the mechanisms do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

NUM_TURNS = 4
NUM_CALLS = 6
REASONING_WORDS = 300
RESULT_WORDS = 120
_NAMES = ("Aldebaran", "Betelgeuse", "Canopus", "Deneb", "Electra", "Fomalhaut", "Gacrux", "Hadar", "Izar", "Kochab")
_TEXT = (
    "the harbour keeps a record of each ship with its draught and cargo while tides turn twice a day and pilots wait "
    "for calm water before they lead a vessel past the long stone pier"
)
_WORDS = _TEXT.split()
PLAIN, TOOLS = "chat", "tool loop"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a model is asked once: a conversation up to here, and the tools it may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Prompts that follow each other. Each begins with the messages of the one before, and then the model's answer.

    key:      for JSON and options. title: for tables. group: PLAIN or TOOLS.
    kwargs:   of the template, for this shape.
    has_loop: the last step but one ends a tool loop: it is the first prompt behind the next user message.
    """

    key: str
    title: str
    prompts: Sequence[ChatPrompt]
    group: str = PLAIN
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    has_loop: bool = False


def shapes() -> list[ChatShape]:
    """Return the conversations that are compared turn by turn."""
    return [
        ChatShape("plain", "chat of four turns", _chat()),
        ChatShape("system", "chat with a system message", _chat(system=True)),
        ChatShape("reasoning", "chat, reasoning in a field", _chat(reasoning="field")),
        ChatShape("inline", "chat, <think> in the content", _chat(reasoning="inline")),
        ChatShape("chat_tools", "chat with tools, none called", _chat(tools=True)),
        ChatShape("loop", "tool loop of six calls", _loop(False, False), TOOLS, has_loop=True),
        ChatShape("loop_text", "tool loop, arguments as text", _loop(False, True), TOOLS, has_loop=True),
        ChatShape("loop_reasoning", "tool loop with reasoning", _loop(True, False), TOOLS, has_loop=True),
        ChatShape("loop_reasoning_text", "reasoning loop, arguments as text", _loop(True, True), TOOLS, has_loop=True),
    ]


def tools(extra: bool = False) -> list[Message]:
    """Return a list of tools; with one more at its end if `extra`."""
    made = [_tool(f"harbour_{name.lower()}", f"Reads the log of pier {name}.") for name in _NAMES[:6]]
    return [*made, _tool("harbour_appended", "Reads what was appended to the log.")] if extra else made


def permuted(value: Any) -> Any:
    """Return JSON with the keys of each object in the opposite order."""
    if isinstance(value, dict):
        return {key: permuted(value[key]) for key in reversed(value)}
    return [permuted(one) for one in value] if isinstance(value, list) else value


def spaced() -> list[Message]:
    """Return a conversation whose answer has blanks at both ends."""
    return [user(0), {"role": "assistant", "content": f"  {sentence('Answer', 0)}  \n"}, user(1)]


def sentence(what: str, number: int) -> str:
    """Return a sentence that no other message has."""
    return f"{what} {number + 1} of pilot {_NAMES[number % len(_NAMES)]}: " + words(12, number)


def words(number: int, start: int = 0) -> str:
    """Return so many words."""
    return " ".join(_WORDS[(start * 7 + i) % len(_WORDS)] for i in range(number)) + "."


def user(number: int) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": sentence("Question", number)}


def system_message() -> Message:
    """Return the system message."""
    return {"role": "system", "content": sentence("Instruction", 0)}


def reasoning(number: int) -> str:
    """Return what a model thought."""
    return f"{sentence('Thought', number)} {words(REASONING_WORDS, number)}"


def _answer(number: int, with_reasoning: str = "") -> Message:
    content = sentence("Answer", number)
    if with_reasoning == "inline":
        return {"role": "assistant", "content": f"<think>\n{reasoning(number)}\n</think>\n\n{content}"}
    made = {"role": "assistant", "content": content}
    return {**made, "reasoning_content": reasoning(number)} if with_reasoning == "field" else made


def _chat(system: bool = False, reasoning: str = "", tools: bool = False) -> list[ChatPrompt]:
    messages = [system_message()] if system else []
    given = _TOOLS if tools else ()
    prompts = []
    for number in range(NUM_TURNS):
        messages = [*messages, user(number)]
        prompts.append(ChatPrompt(messages, given))
        messages = [*messages, _answer(number, reasoning)]
    return prompts


def _loop(with_reasoning: bool, arguments_as_text: bool) -> list[ChatPrompt]:
    messages = [user(0)]
    prompts = [ChatPrompt(messages, _TOOLS)]
    for number in range(NUM_CALLS):
        messages = [*messages, _call(number, with_reasoning, arguments_as_text), _result(number)]
        prompts.append(ChatPrompt(messages, _TOOLS))
    messages = [*messages, _answer(NUM_CALLS, "field" if with_reasoning else ""), user(1)]
    return [*prompts, ChatPrompt(messages, _TOOLS)]


def _call(number: int, with_reasoning: bool, arguments_as_text: bool) -> Message:
    arguments: Any = {"pier": _NAMES[number], "since": 1700 + number, "all": True}
    function = {
        "name": f"harbour_{_NAMES[number % 6].lower()}",
        "arguments": json.dumps(arguments) if arguments_as_text else arguments,
    }
    call = {"id": f"call{number:05d}", "type": "function", "function": function}
    made: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {**made, "reasoning_content": reasoning(number)} if with_reasoning else made


def _result(number: int) -> Message:
    return {
        "role": "tool",
        "name": f"harbour_{_NAMES[number % 6].lower()}",
        "tool_call_id": f"call{number:05d}",
        "content": f"{sentence('Result', number)} {words(RESULT_WORDS, number)}",
    }


def _tool(name: str, description: str) -> Message:
    properties = {
        "pier": {"type": "string", "description": f"The pier that {name} looks at."},
        "since": {"type": "integer", "description": "The first year, such as 1700."},
        "all": {"type": "boolean", "description": "Whether to tell of small boats too."},
    }
    parameters = {"type": "object", "properties": properties, "required": ["pier"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TOOLS = tools()
