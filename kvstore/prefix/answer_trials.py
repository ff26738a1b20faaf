"""Learns which answers a template keeps, by trying them: prompts, answers of each kind, and the prompts that follow.

    prompts   after the first and the second message of a user, with tools, after a tool's result
    answers   text; text with reasoning, as a field or as <think> in the content; a tool call, with and without
    values    of each thinking switch that the template reads

Each answer is tried with two texts: what the next prompts have in common behind the old one is what the template writes
by itself. It takes some hundred renderings of short conversations, within a deadline; what is refused is not known.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvstore.prefix import mechanisms
from kvstore.prefix.answers import AnswerForm, AnswerRules, Run, TurnRule
from kvstore.prefix.diagnosis import SWITCHES
from kvstore.prefix.difference import common_ids
from kvstore.prefix.explain import explain
from kvstore.prefix.rendering import RenderProcess, TemplateRefused
from kvstore.prefix.shapes import Message, user
from kvstore.prefix.template import ModelTemplate
from kvstore.prefix.tokens import Ids

DEADLINE_S = 20.0  # of all renderings together; they take less than one
CALL_IDS = 2  # of a call's beginning: what follows differs by blanks
_OPEN_TAG = re.compile(r"<(?![^<>]*(?:end|close))[^<>/\s]*(?:think|reason|thought)[^<>/\s]*>\s*$", re.IGNORECASE)
_ANY_CALL: Run = (-1,)  # in the place of a call's beginning until that is known

# Pairs that begin and end with different letters, so that no tokenizer gives both the same ids there.
_QUESTIONS = ("Which ship is next at the pier?", "7 pilots wait, count them: 9")
_ANSWERS = ("Gulls follow the ferry.", "Nobody saw 12 boats leave")
_THOUGHTS = ("Remember what tides do.", "Look at harbour lights first")
_NAMES = ("dredge_log", "quay_report")
_RESULTS = ("calm water", "9 knots of wind!")


def learn(
    model: ModelTemplate,
    process: RenderProcess,
    kwargs: Mapping[str, Any] | None = None,
    *,
    estimates: bool = False,
    deadline_s: float = DEADLINE_S,
    now: Callable[[], float] = time.monotonic,
) -> AnswerRules:
    """Return the rules of a template: without turns, and with the reason, where they cannot be known. Never raises.

    kwargs:    of the template, for all requests; else each value of a thinking switch is tried.
    estimates: a stand-in for the tokenizer will do, since only the sentence is wanted.
    """
    if model.tokenizer.is_stand_in and not estimates:
        return AnswerRules((), (), "the model's tokenizer is not at hand")
    try:
        return AnswerTrials(model, process, kwargs or {}, now() + deadline_s, now).rules()
    except TrialsTooLate:
        return AnswerRules((), (), f"the template took longer than {deadline_s:g} s")
    except TemplateRefused as refused:
        return AnswerRules((), (), f"the template refuses a plain chat: {str(refused)[:200]}")


class TrialsTooLate(Exception):
    """The deadline has passed."""


@dataclass(frozen=True, slots=True)
class TriedTurn:
    """A kind of prompt: its messages with the first or the second of two last texts, and tools."""

    messages: Callable[[int], list[Message]]
    tools: Sequence[Message] = ()


class AnswerTrials:
    """All trials of one template."""

    def __init__(
        self,
        model: ModelTemplate,
        process: RenderProcess,
        kwargs: Mapping[str, Any],
        until: float,
        now: Callable[[], float],
    ) -> None:
        self._model = model
        self._process = process
        self._kwargs = kwargs
        self._until = until
        self._now = now
        self.openers: dict[Run, None] = {}  # how reasoning begins
        self.calls: list[Run] = []  # what stands between a prompt and the name of a called function
        self.mechanisms: dict[str, None] = {}  # of answers that are not kept

    def rules(self) -> AnswerRules:
        """Try everything. Raises TrialsTooLate, and TemplateRefused for a template that renders no plain chat."""
        self.render([user(0)], (), self._kwargs)
        for before in ("", "x"):  # a tokenizer may put a blank before a first word
            self.openers[as_run(self.ids(f"{before}<think>")[len(self.ids(before)) :])] = None
        self.openers[as_run(self.ids("\n<think>"))] = None
        self.openers.pop((), None)
        turns: dict[Run, TurnRule] = {}
        for kwargs in self._values():
            for turn in _turns():
                try:
                    rule = self._rule(turn, kwargs)
                except TemplateRefused:
                    continue
                old = turns.get(rule.tail, rule)
                kept = tuple(dict.fromkeys((*old.kept, *rule.kept)))
                turns[rule.tail] = TurnRule(rule.tail, old.opens or rule.opens, kept)
        turns.pop((), None)
        if not turns:
            return AnswerRules((), (), "the template's prompts have no end in common")
        call = _common_end(self.calls)
        told = [
            replace(rule, kept=tuple(dict.fromkeys(_with_call(one, call) for one in rule.kept)))
            for rule in turns.values()
        ]
        rules = AnswerRules(tuple(told), tuple(self.openers), "")
        return replace(rules, why=_why(rules, [mechanisms.BY_KEY[key].title for key in self.mechanisms]))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message],
        kwargs: Mapping[str, Any],
        *,
        generation_prompt: bool = True,
    ) -> str:
        """Return a prompt. Raises TemplateRefused, TrialsTooLate."""
        if self._now() > self._until:
            raise TrialsTooLate
        return self._process.render(
            self._model.template, messages, tools=tools, kwargs=kwargs, generation_prompt=generation_prompt
        )

    def ids(self, text: str) -> Ids:
        """Return the tokens of a text."""
        return self._model.tokenizer.encode(text)

    def _values(self) -> Iterator[Mapping[str, Any]]:
        names = self._process.names(self._model.template)
        yield self._kwargs
        for name, values in SWITCHES.items():
            if name in names and name not in self._kwargs:
                yield from ({**self._kwargs, name: value} for value in values)

    def _rule(self, turn: TriedTurn, kwargs: Mapping[str, Any]) -> TurnRule:
        """Return what such prompts have in common at their ends, which may be nothing, and what is kept of answers."""
        prompt, other = (self.render(turn.messages(which), turn.tools, kwargs) for which in (0, 1))
        ids = self.ids(prompt)
        common = common_ids(ids[::-1], self.ids(other)[::-1])
        trial = AnswerTrial(self, turn, kwargs, prompt, ids)
        kept = [*trial.texts(), *(trial.calls() if turn.tools else ())]
        return TurnRule(as_run(ids[len(ids) - common :]), _OPEN_TAG.search(prompt) is not None, tuple(kept))


class AnswerTrial:
    """The answers to one prompt."""

    def __init__(self, trials: AnswerTrials, turn: TriedTurn, kwargs: Mapping[str, Any], prompt: str, ids: Ids) -> None:
        self._trials = trials
        self._tools = turn.tools
        self._messages = turn.messages(0)
        self._kwargs = kwargs
        self._prompt = prompt
        self._ids = ids

    def texts(self) -> Iterator[AnswerForm]:
        """Try answers that end the turn."""
        plain = self._lead([self._next(user(1), content=answer) for answer in _ANSWERS], _ANSWERS[0])
        if plain is not None:
            yield AnswerForm(plain, False)
        yield from self._thinking(
            [self._next(user(1), content=_ANSWERS[0], reasoning_content=thought) for thought in _THOUGHTS]
        )
        # As the model writes it: behind a prompt that opens the reasoning there is no tag to open it.
        begin = "" if _OPEN_TAG.search(self._prompt) else "<think>\n"
        contents = [f"{begin}{thought}\n</think>\n\n{_ANSWERS[0]}" for thought in _THOUGHTS]
        nexts = [self._next(user(1), content=content) for content in contents]
        if plain is not None and nexts[0].startswith(self._prompt) and contents[0] in nexts[0]:
            yield AnswerForm(plain, True)  # kept as it is, whatever blanks it has
        else:
            yield from self._thinking(nexts)

    def calls(self) -> Iterator[AnswerForm]:
        """Try answers that call a tool, arguments as an object or, where the template wants that, as text."""
        for as_text in (False, True):
            try:
                yield from list(self._calls(as_text))
            except TemplateRefused:
                continue
            return

    def _calls(self, as_text: bool) -> Iterator[AnswerForm]:
        def following(name: str, **reasoning: str) -> str:
            return self._next(_result(name, 0), content="", tool_calls=[_call(name, as_text)], **reasoning)

        plain = [following(name) for name in _NAMES]
        lead = self._lead(plain, _NAMES[0])
        if lead:
            self._trials.calls.append(lead)
        if lead is not None:
            yield AnswerForm(lead, False, _ANY_CALL if lead else ())
        thinking = [following(_NAMES[0], reasoning_content=thought) for thought in _THOUGHTS]
        for kept in self._thinking(thinking):
            other = following(_NAMES[1], reasoning_content=_THOUGHTS[0])
            whole = self._lead([thinking[0], other], _NAMES[0])
            if whole:
                self._trials.calls.append(whole)
            yield replace(kept, call=_ANY_CALL if whole else ())

    def _thinking(self, nexts: Sequence[str]) -> Iterator[AnswerForm]:
        """Yield what is kept of an answer with reasoning; learn how that begins."""
        lead = self._lead(nexts, _THOUGHTS[0])
        if lead is not None:
            if lead:
                self._trials.openers[lead] = None
            yield AnswerForm(lead, True)

    def _lead(self, nexts: Sequence[str], own: str) -> Run | None:
        """Return the ids between the prompt and the answer's own text; None if the next prompt does not have it there.

        nexts: two that differ in that text. () where a token grows across the border, since others may not.
        """
        if not nexts[0].startswith(self._prompt) or own not in nexts[0][len(self._prompt) :]:
            return None
        first, second = (self._trials.ids(text) for text in nexts)
        if not np.array_equal(first[: len(self._ids)], self._ids):
            return ()
        return as_run(first[len(self._ids) : common_ids(first, second)])

    def _next(self, follower: Message, **answer: Any) -> str:
        """Return the next prompt after an answer, and note why it does not begin with this one and the answer."""
        added = [{"role": "assistant", **answer}, follower]
        following = self._trials.render([*self._messages, *added], self._tools, self._kwargs)
        base = self._trials.render(self._messages, self._tools, self._kwargs, generation_prompt=False)
        found = explain(self._prompt, following, base, self._messages, [*self._messages, *added], self._tools)
        if found.mechanism is not None:
            self._trials.mechanisms[found.mechanism.key] = None
        return following


def as_run(ids: Iterable[int]) -> Run:
    """Return ids as rules have them."""
    return tuple(int(one) for one in ids)


def _turns() -> list[TriedTurn]:
    """Return the kinds of prompts."""

    def first(which: int) -> list[Message]:
        return [{"role": "user", "content": _QUESTIONS[which]}]

    def second(which: int) -> list[Message]:
        return [user(0), {"role": "assistant", "content": _ANSWERS[1]}, *first(which)]

    def in_loop(which: int, **reasoning: str) -> list[Message]:
        call = {"role": "assistant", "content": "", "tool_calls": [_call(_NAMES[1], False)], **reasoning}
        return [user(0), call, _result(_NAMES[1], which)]

    def in_thinking_loop(which: int) -> list[Message]:
        return in_loop(which, reasoning_content=_THOUGHTS[1])

    return [
        TriedTurn(first),
        TriedTurn(second),
        TriedTurn(first, _TOOLS),
        TriedTurn(second, _TOOLS),
        TriedTurn(in_loop, _TOOLS),
        TriedTurn(in_thinking_loop, _TOOLS),
    ]


def _call(name: str, as_text: bool) -> Message:
    arguments: Any = {"pier": "Izar"}
    function = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
    return {"id": "call00001", "type": "function", "function": function}


def _result(name: str, which: int) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": "call00001", "content": _RESULTS[which]}


def _tool(name: str) -> Message:
    parameters = {"type": "object", "properties": {"pier": {"type": "string"}}, "required": ["pier"]}
    function = {"name": name, "description": "Reads the log of a pier.", "parameters": parameters}
    return {"type": "function", "function": function}


_TOOLS = [_tool(name) for name in _NAMES]


def _common_end(runs: Sequence[Run]) -> Run:
    """Return what all runs end with."""
    end = runs[0] if runs else ()
    for run in runs:
        while end and run[-len(end) :] != end:
            end = end[1:]
    return end


def _with_call(kept: AnswerForm, call: Run) -> AnswerForm:
    """Return an answer that calls with how a call begins: no condition where that is not known."""
    if kept.call != _ANY_CALL:
        return kept
    lead = kept.lead
    if call and not kept.thinks and lead[-len(call) :] == call:
        lead = lead[: -len(call)]
    return AnswerForm(lead, kept.thinks, call[:CALL_IDS])


def _why(rules: AnswerRules, reasons: Sequence[str]) -> str:
    """Return the sentence for a log."""
    because = f" ({', '.join(reasons)})" if reasons else ""
    if rules.keeps_all:
        return "all answers: the template keeps them as they are"
    if rules.keeps_none:
        return f"no answer: the next prompt never begins with one{because}"
    every = [kept for rule in rules.turns for kept in rule.kept]
    names = []
    for thinks, what in ((False, "without reasoning"), (True, "with reasoning")):
        of_kind = [kept for kept in every if kept.thinks == thinks]
        if any(not kept.call for kept in of_kind):
            names.append(f"answers {what}")
        elif of_kind:
            names.append(f"tool calls {what}")
    return f"{' and '.join(names)}, as far as the next prompt can begin with them{because}"
