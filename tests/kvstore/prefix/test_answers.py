"""What is known of answers that a template keeps: no answer that the next prompt begins with is ever dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest

from kvstore.prefix.answer_trials import learn
from kvstore.prefix.answers import AnswerForm, AnswerJudge, AnswerRules, AnswerVerdict, TurnRule
from kvstore.prefix.rendering import RenderProcess, Template, TemplateRefused
from kvstore.prefix.shapes import Message, tools, user
from kvstore.prefix.template import ModelTemplate
from kvstore.prefix.tokens import Ids, StandIn
from tests.kvstore.prefix import templates

SAVE, DROP, OPEN, UNKNOWN = AnswerVerdict.SAVE, AnswerVerdict.DROP, AnswerVerdict.OPEN, AnswerVerdict.UNKNOWN
THOUGHT, ANSWER, CALL = "Counting the boats of today", "There are 14 boats", "<|call|>harbour_deneb"
WRITTEN = {
    "answer": ANSWER,
    "thought": f"<think>{THOUGHT}</think>{ANSWER}",
    "open thought": f"{THOUGHT}</think>{ANSWER}",
    "thought in lines": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}",
    "empty thought": f"<think></think>{ANSWER}",
    "tag": f"<|final|>{ANSWER}",
    "call": CALL,
    "thought and call": f"<think>{THOUGHT}</think>{CALL}",
    "empty thought and call": f"<think></think>{CALL}",
}


class OwnTokenizer(StandIn):
    """Of the model, for a test."""

    is_stand_in = False


TOKENIZER = OwnTokenizer()
Learned = Callable[[str], AnswerRules]


@pytest.fixture(scope="module")
def learned(process: RenderProcess) -> Learned:
    """The rules of a template, learned once for all tests."""
    return cache(lambda text: learn(ModelTemplate("ours", Template(text), TOKENIZER), process))


def verdict(rules: AnswerRules, prompt: str, written: str) -> AnswerVerdict:
    judge = rules.judge(TOKENIZER.encode(prompt).tolist())
    for token in TOKENIZER.encode(written).tolist():
        judge.add([token])
    return judge.verdict


def asked(template: str, process: RenderProcess, with_tools: bool = False, **kwargs: Any) -> str:
    return process.render(Template(template), [user(3)], tools=tools() if with_tools else None, kwargs=kwargs)


def sent_back() -> Iterator[tuple[Message, Message]]:
    """The answer as clients send it, and the message behind it."""
    for content in (ANSWER, WRITTEN["thought"], WRITTEN["thought in lines"], WRITTEN["open thought"], "<|final|>x"):
        yield {"role": "assistant", "content": content}, user(4)
    yield {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}, user(4)
    call = {"id": "c", "type": "function", "function": {"name": "harbour_deneb", "arguments": {}}}
    result = {"role": "tool", "name": "harbour_deneb", "tool_call_id": "c", "content": "calm"}
    for fields in ({}, {"reasoning_content": THOUGHT}):
        yield {"role": "assistant", "content": "", "tool_calls": [call], **fields}, result


def can_hit(process: RenderProcess, template: str, messages: Sequence[Message], prompt: str, ids: Ids) -> bool:
    """Whether some next prompt begins with a prompt and the first tokens behind it, all but the last few."""
    wanted = [*TOKENIZER.encode(prompt).tolist(), *ids.tolist()]
    for answer, follower in sent_back():
        try:
            following = process.render(Template(template), [*messages, answer, follower], tools=tools())
        except TemplateRefused:
            continue
        if TOKENIZER.encode(following).tolist()[: len(wanted)] == wanted:
            return True
    return False


ALL = {
    name: text
    for name, text in vars(templates).items()
    if name.isupper() and not name.startswith("_") and "<|assistant|>" in str(text)
}


@pytest.mark.parametrize("name", ALL)
def test_no_answer_that_a_next_prompt_begins_with_is_dropped(
    process: RenderProcess, learned: Learned, name: str
) -> None:
    template = ALL[name]
    rules = learned(template)
    messages = [user(3)]
    prompt = process.render(Template(template), messages, tools=tools())

    for written in WRITTEN.values():
        if can_hit(process, template, messages, prompt, TOKENIZER.encode(written)):
            assert verdict(rules, prompt, written) is SAVE, written


@pytest.mark.parametrize(
    ("template", "written", "expected"),
    [
        (templates.STABLE, "answer", SAVE),
        (templates.STABLE, "thought", SAVE),
        (templates.GENERATION_PROMPT, "open thought", DROP),
        (templates.TAG_BETWEEN, "answer", OPEN),
        (templates.TAG_BETWEEN, "thought", DROP),
        (templates.TAG_BETWEEN, "tag", SAVE),
        (templates.REASONING_DROPPED, "answer", SAVE),
        (templates.REASONING_DROPPED, "thought", DROP),
        (templates.REASONING_DROPPED, "empty thought", DROP),
        (templates.THINKS_IN_LOOPS, "answer", SAVE),
        (templates.THINKS_IN_LOOPS, "thought", OPEN),
        (templates.THINKS_IN_LOOPS, "thought and call", SAVE),
        (templates.THINKS_IN_LOOPS, "call", SAVE),
        (templates.NEWEST_REASONING_ONLY, "thought", SAVE),
        (templates.ANSWERS_STRIPPED, "answer", SAVE),
        (templates.HISTORY_CHANGED, "answer", DROP),
    ],
)
def test_each_template_keeps_what_it_keeps(
    process: RenderProcess, learned: Learned, template: str, written: str, expected: AnswerVerdict
) -> None:
    rules = learned(template)

    assert verdict(rules, asked(template, process, with_tools=True), WRITTEN[written]) is expected


def test_a_thinking_switch_is_seen_at_the_end_of_the_prompt(process: RenderProcess, learned: Learned) -> None:
    rules = learned(templates.SWITCHED)

    assert verdict(rules, asked(templates.SWITCHED, process), ANSWER) is SAVE
    assert verdict(rules, asked(templates.SWITCHED, process, enable_thinking=False), ANSWER) is DROP


def test_a_prompt_that_the_template_did_not_make_is_not_judged(learned: Learned) -> None:
    assert verdict(learned(templates.STABLE), "Once upon a time", ANSWER) is UNKNOWN


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (templates.STABLE, "all answers: the template keeps them as they are"),
        (templates.HISTORY_CHANGED, "no answer: the next prompt never begins with one (history is rewritten)"),
        (templates.THINKS_IN_LOOPS, "answers without reasoning and tool calls with reasoning, as far as"),
        (templates.REFUSES_ALL, "the template refuses a plain chat: TemplateError: never"),
        (templates.NO_TEMPLATE, "the template refuses a plain chat: TemplateSyntaxError"),
    ],
)
def test_what_was_learned_is_told_in_a_sentence(learned: Learned, template: str, says: str) -> None:
    assert learned(template).why.startswith(says)


def test_a_stand_in_for_the_tokenizer_decides_nothing(process: RenderProcess) -> None:
    rules = learn(ModelTemplate("ours", Template(templates.STABLE), StandIn()), process)

    assert rules == AnswerRules((), (), "the model's tokenizer is not at hand")


def test_trials_end_at_their_deadline() -> None:
    class SlowProcess(RenderProcess):
        clock = 0.0

        def render(self, *arguments: Any, **options: Any) -> str:
            self.clock += 1.0
            return "text"

        def names(self, template: Template) -> list[str]:
            return []

    process = SlowProcess()

    rules = learn(ModelTemplate("slow", Template(""), TOKENIZER), process, deadline_s=5.0, now=lambda: process.clock)

    assert rules.why == "the template took longer than 5 s"
    assert process.clock == 6.0


def test_an_answer_is_open_until_its_beginning_is_long_enough() -> None:
    kept: Mapping[str, AnswerForm] = {"tagged": AnswerForm((1, 2, 3), False), "call": AnswerForm((), True, (7, 8))}
    rule = TurnRule((9,), False, tuple(kept.values()))

    def judged(*answer: int) -> AnswerVerdict:
        judge = AnswerJudge(rule, ((5, 6),))
        for token in answer:
            judge.add([token])
        return judge.verdict

    assert [judged(*answer) for answer in ((), (1,), (1, 2), (5,))] == [OPEN] * 4
    assert judged(1, 2, 3) is SAVE
    assert judged(1, 4) is DROP
    assert judged(5, 4) is DROP
    assert judged(5, 6, 1, 7) is OPEN
    assert judged(5, 6, 1, 7, 8) is SAVE
    assert judged(5, 6, 7, 1, 8) is OPEN


def test_the_longest_end_of_a_prompt_decides() -> None:
    rules = AnswerRules((TurnRule((2,), False, (AnswerForm((), False),)), TurnRule((1, 2), False, ())), (), "")

    assert rules.judge([0, 2]).add([5]) is SAVE
    assert rules.judge([0, 1, 2]).verdict is DROP
    assert rules.judge([]).verdict is UNKNOWN
