"""Where breakpoints lie in a prompt, with templates that put texts in odd places. A letter is a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvstore.cluster.breakpoints import hint_of
from kvstore.cluster.messages import ChatMessage

CACHED = {"cache_control": {"type": "ephemeral"}}

Messages = list[dict[str, str]]


def message(role: str, *parts: tuple[str, dict[str, Any]]) -> ChatMessage:
    content = [{"type": "text", "text": text, **more} for text, more in parts]
    return ChatMessage.model_validate({"role": role, "content": content})


def plain_lines(messages: Messages) -> list[int]:
    return list(map(ord, "".join(f"<{one['role']}>{one['content'].strip()}|" for one in messages) + "<assistant>"))


def places(
    messages: list[ChatMessage], encode: Callable[[Messages], list[int]] = plain_lines
) -> list[tuple[str, str, float]]:
    """Of each breakpoint its name, the prompt before it and its seconds."""
    tokens = encode([one.plain for one in messages])
    hint = hint_of(messages, tokens, encode)
    assert hint is not None
    return [
        (
            action["action_id"],
            "".join(map(chr, tokens[: action["payload"]["end"]])),
            action["payload"]["ttl_s"],
        )
        for action in hint["actions"]
    ]


def test_without_breakpoints_there_is_no_hint() -> None:
    assert hint_of([message("user", ("hi", {}))], [1], plain_lines) is None


def test_a_breakpoint_ends_what_comes_before_it_in_the_prompt() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    messages = [message("system", ("be kind", hour)), message("user", ("a book", CACHED), (" and a question", {}))]

    assert places(messages) == [
        ("messages[0].content[0].cache_control", "<system>be kind", 3600.0),
        ("messages[1].content[0].cache_control", "<system>be kind|<user>a book", 300.0),
    ]


@pytest.mark.parametrize("next_text", ["#next", "@next", "##", ""])
def test_whatever_goes_on_behind_it_is_not_taken_for_the_same(next_text: str) -> None:
    messages = [message("user", ("a book", CACHED), (next_text, {}))]

    assert [prompt for _, prompt, _ in places(messages)] == ["<user>a book"]


def test_a_template_that_moves_a_message_moves_its_breakpoint() -> None:
    def system_last(messages: Messages) -> list[int]:
        return plain_lines(sorted(messages, key=lambda one: one["role"] == "system"))

    messages = [message("system", ("be kind", CACHED)), message("user", ("hi", {}))]

    assert [prompt for _, prompt, _ in places(messages, system_last)] == ["<user>hi|<system>be kind"]


def test_a_breakpoint_that_leaves_no_trace_in_the_prompt_retains_nothing() -> None:
    def without_assistants(messages: Messages) -> list[int]:
        return plain_lines([one for one in messages if one["role"] != "assistant"])

    messages = [message("assistant", ("dropped", CACHED)), message("user", ("hi", {}))]

    assert [prompt for _, prompt, _ in places(messages, without_assistants)] == [""]


def test_a_template_that_refuses_other_text_retains_nothing() -> None:
    def only_this(messages: Messages) -> list[int]:
        if messages[0]["content"] != "hi there":
            raise ValueError("no")
        return plain_lines(messages)

    assert [prompt for _, prompt, _ in places([message("user", ("hi", CACHED), (" there", {}))], only_this)] == [""]
