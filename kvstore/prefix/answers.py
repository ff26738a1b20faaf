"""Which answers the next turn can begin with, told by token ids while they are generated.

`answer_trials` learns the rules of a template once; a connector asks for a verdict on each answer and saves no decoded
page that can never hit. By ids alone, since that is what an engine has: the end of a prompt tells what kind of turn it
is, the first ids of the answer whether it thinks, ids within it whether it calls a tool.

    prompt    ...<|im_start|>assistant\\n           its tail: the rule of such turns
    answer    <think>\\nThe user wants...           it thinks; the history of a plain chat has no thought: DROP
    answer    Paris is...                           the history has it right behind the prompt: SAVE
    answer    <think>...</think>\\n<tool_call>...   OPEN until the call, which the next prompt of a loop has: SAVE then

An answer is dropped only if the template keeps it in no way in which a client may send it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from radix.tokens import TokenArray

Run = tuple[int, ...]  # ids that follow each other


class AnswerVerdict(Enum):
    """SAVE: the next turn may begin with it. DROP: it never can. OPEN: not known yet. UNKNOWN: no rule for the turn."""

    SAVE = "save"
    DROP = "drop"
    OPEN = "open"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """A form of answers that stand right behind their prompt in the next one.

    lead:   what the history has before the answer's own text, so the model must write it, too.
    thinks: it begins with reasoning.
    call:   how a tool call begins, if only answers that call are kept; () for all.
    """

    lead: Run
    thinks: bool
    call: Run = ()


@dataclass(frozen=True, slots=True)
class TurnRule:
    """Turns whose prompt ends with `tail`. opens: it ends within the reasoning. kept: () if no answer can hit."""

    tail: Run
    opens: bool
    kept: tuple[AnswerForm, ...]


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What a template keeps.

    turns:   () if nothing is known. openers: how reasoning begins. why: for a log, one sentence.
    """

    turns: tuple[TurnRule, ...]
    openers: tuple[Run, ...]
    why: str

    @property
    def keeps_all(self) -> bool:
        """Whether every answer can hit: as good as no rule."""
        free = ((), *self.openers)
        every = [{kept.thinks for kept in rule.kept if kept.lead in free and not kept.call} for rule in self.turns]
        return bool(every) and all(found == {True, False} for found in every)

    @property
    def keeps_none(self) -> bool:
        """Whether no answer can hit."""
        return bool(self.turns) and not any(rule.kept for rule in self.turns)

    def judge(self, prompt: Sequence[int] | TokenArray) -> AnswerJudge:
        """Return the judge of the answer to a prompt."""
        longest = max((len(rule.tail) for rule in self.turns), default=0)
        end = tuple(int(one) for one in prompt[-longest:]) if longest else ()
        found = [rule for rule in self.turns if end[-len(rule.tail) :] == rule.tail]
        return AnswerJudge(max(found, key=lambda rule: len(rule.tail), default=None), self.openers)


class AnswerJudge:
    """The verdict on one answer while it grows. `add` is O(new ids) while it is open, and free after."""

    __slots__ = ("_head", "_need", "_openers", "_rule", "_waiting", "verdict")

    def __init__(self, rule: TurnRule | None, openers: tuple[Run, ...]) -> None:
        self._rule = rule
        self._openers = openers
        self._head: list[int] = []  # of the answer, until it is judged by it; then the last ids seen
        self._waiting: tuple[Run, ...] | None = None  # calls that would save it
        self._need = 0
        self.verdict = AnswerVerdict.OPEN
        if rule is None:
            self.verdict = AnswerVerdict.UNKNOWN
        elif not rule.kept:
            self.verdict = AnswerVerdict.DROP
        else:
            self._need = max(map(len, [*openers, *(kept.lead for kept in rule.kept)]), default=0)

    @classmethod
    def decided(cls, verdict: AnswerVerdict) -> AnswerJudge:
        """Return a judge that needs no answer."""
        made = cls(None, ())
        made.verdict = verdict
        return made

    def add(self, ids: Sequence[int]) -> AnswerVerdict:
        """Take the next ids of the answer; return the verdict so far."""
        if self.verdict is AnswerVerdict.OPEN and len(ids):
            self._head += [int(one) for one in ids]
            if self._waiting is None:
                self._judge_head()
            if self._waiting is not None and self.verdict is AnswerVerdict.OPEN:
                self._look_for_call(self._waiting)
        return self.verdict

    def _judge_head(self) -> None:
        assert self._rule is not None
        head = tuple(self._head[: self._need])
        if len(head) < self._need and any(_may_become(head, opener) for opener in self._openers):
            return
        thinks = self._rule.opens or self._opens(head)
        # An empty thought in the history begins as a real one does, and ends within its lead.
        able = [kept for kept in self._rule.kept if kept.thinks == thinks or self._opens(kept.lead)]
        fits = [kept for kept in able if head[: len(kept.lead)] == kept.lead]
        if any(not kept.call for kept in fits):
            self.verdict = AnswerVerdict.SAVE
        elif len(head) < self._need and any(_may_become(head, kept.lead) for kept in able):
            return
        elif fits:
            self._waiting = tuple(dict.fromkeys(kept.call for kept in fits))
        else:
            self.verdict = AnswerVerdict.DROP

    def _opens(self, ids: Run) -> bool:
        return any(ids[: len(opener)] == opener for opener in self._openers)

    def _look_for_call(self, calls: tuple[Run, ...]) -> None:
        for call in calls:
            if any(tuple(self._head[at : at + len(call)]) == call for at in range(len(self._head) - len(call) + 1)):
                self.verdict = AnswerVerdict.SAVE
        del self._head[: max(0, len(self._head) - max(map(len, calls)) + 1)]


def _may_become(head: Run, run: Run) -> bool:
    """Return whether an answer that is `head` so far may still begin with `run`."""
    return len(head) < len(run) and run[: len(head)] == head
