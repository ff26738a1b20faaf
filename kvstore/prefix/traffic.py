"""Real conversations, followed: where turn n+1 left turn n's prompt, how often, and what it cost.

Requests come one after another, from a log or from a server that watches itself. Of each session only the last request
is kept, of so many sessions and characters as the bounds say. One thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.prefix import mechanisms
from kvstore.prefix.changes import client_change
from kvstore.prefix.difference import PrefixDifference, compare_ids
from kvstore.prefix.explain import KEPT, PrefixExplanation, explain
from kvstore.prefix.mechanisms import Mechanism
from kvstore.prefix.rendering import RenderProcess, TemplateRefused
from kvstore.prefix.requests import ChatRequest
from kvstore.prefix.spans import Spans
from kvstore.prefix.template import ModelTemplate
from kvstore.prefix.tokens import Ids

MAX_SESSIONS = 1024
MAX_CHARS = 64_000_000  # of the prompts that are kept, all sessions together
MAX_EXAMPLES = 3  # of each mechanism
KEPT_WHOLE = "kept"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A request as its prompt. base: without a generation prompt; "" of a completion."""

    request: ChatRequest
    text: str
    base: str
    ids: Ids


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """From one request of a session to the next."""

    mechanism: Mechanism | None
    explanation: PrefixExplanation | None
    difference: PrefixDifference


class Traffic:
    """The sessions, and the sums over them."""

    def __init__(
        self,
        model: ModelTemplate,
        process: RenderProcess,
        *,
        block_sizes: Sequence[int] = (16, 64, 256),
        max_sessions: int = MAX_SESSIONS,
        max_chars: int = MAX_CHARS,
    ) -> None:
        self._model = model
        self._process = process
        self._block_sizes = block_sizes
        self._max_sessions = max_sessions
        self._max_chars = max_chars
        self._last: OrderedDict[str, Rendered] = OrderedDict()
        self._chars = 0
        self._spans = Spans()
        self._turns: Counter[tuple[str, str]] = Counter()
        self._lost: Counter[tuple[str, str]] = Counter()
        self._examples: dict[str, list[dict[str, Any]]] = {}
        self._counts: Counter[str] = Counter()
        self._refused: list[dict[str, str]] = []

    def observe(self, request: ChatRequest, name: str = "") -> SessionTurn | None:
        """Take the next request; None if it is its session's first, or refused. name: for examples, such as a line."""
        self._counts["requests"] += 1
        try:
            new = self.render(request)
        except TemplateRefused as refused:
            self._counts["refused"] += 1
            if name and len(self._refused) < MAX_EXAMPLES:
                self._refused.append({"at": name, "reason": str(refused)})
            return None
        repeats = self._spans.observe(new.ids)
        self._counts["prompt_tokens"] += len(new.ids)
        self._counts["prefix_tokens"] += repeats.prefix
        self._counts["repeated_elsewhere_tokens"] += repeats.elsewhere
        old = self._last.pop(request.session, None)
        self._keep(request.session, new, old)
        if old is None:
            self._counts["sessions"] += 1
            return None
        turn = self.compare(old, new)
        key = (request.shape, turn.mechanism.key if turn.mechanism else KEPT_WHOLE)
        self._turns[key] += 1
        self._lost[key] += turn.difference.lost_tokens
        self._show(key[1], turn, name)
        return turn

    def render(self, request: ChatRequest) -> Rendered:
        """Return a request's prompt. Raises TemplateRefused."""
        if isinstance(request.prompt, str):
            return Rendered(request, request.prompt, "", self._model.tokenizer.encode(request.prompt))
        if request.prompt is not None:
            return Rendered(request, "", "", np.array(request.prompt, np.int64))
        options: dict[str, Any] = {"tools": request.tools, "kwargs": request.kwargs}
        text = self._process.render(self._model.template, request.messages, **options)
        base = self._process.render(self._model.template, request.messages, generation_prompt=False, **options)
        return Rendered(request, text, base, self._model.tokenizer.encode(text))

    def compare(self, old: Rendered, new: Rendered) -> SessionTurn:
        """Say where a prompt leaves the one before it, and why. No mechanism: it begins with all of it."""
        difference = compare_ids(old.text, new.text, old.ids, new.ids, self._block_sizes)
        changed = client_change(old.request, new.request)
        if changed is not None or old.request.prompt is not None:
            return SessionTurn(changed if difference.lost_tokens else None, None, difference)
        found = explain(old.text, new.text, old.base, old.request.messages, new.request.messages, old.request.tools)
        if found.outcome == KEPT and difference.lost_tokens:
            return SessionTurn(mechanisms.BORDER_TOKEN, found, difference)
        return SessionTurn(found.mechanism, found, difference)

    def report(self) -> dict[str, Any]:
        """Return the sums, as JSON has them; mechanisms that cost most come first."""
        groups: list[dict[str, Any]] = [
            {"shape": shape, "mechanism": key, "turns": count, "lost_tokens": self._lost[shape, key]}
            for (shape, key), count in self._turns.items()
        ]
        groups.sort(key=lambda group: (-group["lost_tokens"], -group["turns"]))
        names = ("requests", "sessions", "refused", "prompt_tokens", "prefix_tokens", "repeated_elsewhere_tokens")
        return {
            "template": self._model.name,
            "tokenizer": self._model.tokenizer.name,
            "tokens_are_estimates": self._model.tokenizer.is_stand_in,
            **{name: self._counts[name] for name in names},
            "turns": sum(self._turns.values()),
            "lost_tokens": sum(self._lost.values()),
            "groups": groups,
            "first_refused": list(self._refused),
            "examples": {key: list(found) for key, found in self._examples.items()},
        }

    def _keep(self, session: str, new: Rendered, old: Rendered | None) -> None:
        self._chars += _size(new) - (_size(old) if old else 0)
        self._last[session] = new
        while self._last and (len(self._last) > self._max_sessions or self._chars > self._max_chars):
            _, gone = self._last.popitem(last=False)
            self._chars -= _size(gone)

    def _show(self, key: str, turn: SessionTurn, name: str) -> None:
        """Keep the first few turns of a mechanism, if they have a name: a server keeps no prompts to show."""
        found = self._examples.setdefault(key, [])
        if name and turn.mechanism and len(found) < MAX_EXAMPLES:
            place = turn.explanation.place if turn.explanation else ""
            window: Mapping[str, str] = {
                part: getattr(turn.difference.window, part) for part in ("shared", "old", "new")
            }
            found.append({"at": name, "place": place, "lost_tokens": turn.difference.lost_tokens, **window})


def _size(rendered: Rendered) -> int:
    return len(rendered.text) + len(rendered.base) + 8 * len(rendered.ids)
