"""Workloads as values: requests, in the order in which they are played, and the prompts they turn into.

A request of a conversation holds only what it adds; its prompt is the conversation so far, with the answers that were
really given. So requests are pure (made from a seed, before any server is asked) while prompts grow with the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "chat", "completions"

VOCAB_SIZE = 20_000  # every tokenizer in wide use has more than 32,000


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Blocks:
    """A prompt as a trace has it: ids of blocks, equal ids being equal tokens, and its length.

    tokens beyond the blocks belong to request `tail` alone.
    """

    ids: tuple[int, ...]
    num_tokens: int
    tail: int


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request.

    number:        its place in the workload, from 0.
    conversation:  requests of one conversation share a session.
    prompt:        what it adds to the conversation, or a whole prompt of a trace.
    answer_tokens: how many tokens are asked for.
    after:         the request that must be answered first; its conversation so far is the head of this prompt
                   (of messages; blocks are whole prompts already).
    last:          whether the conversation ends here.
    part:          what to report it under, e.g. "round 2"; "" for nothing.
    at_s:          when a trace has it, seconds from the trace's beginning.
    """

    number: int
    conversation: int
    prompt: tuple[Message, ...] | Blocks
    answer_tokens: int
    after: int | None = None
    last: bool = True
    part: str = ""
    at_s: float | None = None


@dataclass(frozen=True)
class Workload:
    """Requests in play order; `after` always points backwards.

    api:           what the prompts are made for, CHAT or COMPLETIONS.
    parameters:    what it was made from, for the report.
    block_tokens:  tokens played for each block id of a trace.
    """

    name: str
    requests: tuple[PlannedRequest, ...]
    api: str
    seed: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    block_tokens: int = 0
    vocab_size: int = VOCAB_SIZE

    @property
    def has_times(self) -> bool:
        """Whether each request has a time of its own."""
        return bool(self.requests) and all(request.at_s is not None for request in self.requests)

    def is_conversation(self, request: PlannedRequest) -> bool:
        """Whether `request` is one of several of its conversation."""
        return request.after is not None or not request.last

    def messages(self, request: PlannedRequest, answers: Mapping[int, str]) -> list[Message] | None:
        """The conversation up to and with `request`; None if an answer before it is missing."""
        turns: list[Message] = []
        at = request
        while True:  # from the end of the conversation to its beginning
            assert not isinstance(at.prompt, Blocks)
            turns[:0] = at.prompt
            if at.after is None:
                return turns
            if at.after not in answers:
                return None
            turns.insert(0, Message("assistant", answers[at.after]))
            at = self.requests[at.after]

    def body(self, request: PlannedRequest, answers: Mapping[int, str], api: str) -> dict[str, Any] | None:
        """The prompt as the fields of an OpenAI request; None if an answer before it is missing.

        Blocks become token ids, whatever `api` says: chats have no such form.
        """
        if isinstance(request.prompt, Blocks):
            from kvstore.load.tokens import make_ids  # numpy, which the command line does without until it plays

            asked = request.prompt
            ids = make_ids(asked.ids, asked.num_tokens, asked.tail, self.block_tokens, self.vocab_size, self.seed)
            return {"prompt": ids}
        messages = self.messages(request, answers)
        if messages is None:
            return None
        if api == CHAT:
            return {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        return {"prompt": as_text(messages)}


def as_text(messages: Sequence[Message]) -> str:
    """A conversation as one text, for models that know no chats. A single message is the text as it is."""
    if len(messages) == 1:
        return messages[0].content
    lines = [m.content if m.role == "system" else f"{m.role.capitalize()}: {m.content}" for m in messages]
    return "\n\n".join([*lines, "Assistant:"])
