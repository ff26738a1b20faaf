"""Each mechanism is found in a template that has it, and only there."""

from __future__ import annotations

import json

import pytest

from kvstore.prefix import mechanisms
from kvstore.prefix.diagnosis import CANNOT_TELL, STABLE, UNSTABLE, Diagnosis, ShapeReport, diagnose
from kvstore.prefix.mechanisms import Mechanism
from kvstore.prefix.rendering import RenderProcess, Template, TemplateRefused
from kvstore.prefix.template import ModelTemplate
from kvstore.prefix.tokens import Ids, StandIn, Tokenizer
from tests.kvstore.prefix import templates


def run(process: RenderProcess, text: str, tokenizer: Tokenizer | None = None, **kwargs: object) -> Diagnosis:
    return diagnose(ModelTemplate("ours", Template(text), tokenizer or StandIn()), process, (16, 64), kwargs)


def found(diagnosis: Diagnosis) -> set[str]:
    return {finding.mechanism.key for finding in diagnosis.findings}


def row(diagnosis: Diagnosis, key: str) -> ShapeReport:
    return next(shape for shape in [*diagnosis.shapes, *diagnosis.switches] if shape.key == key)


def test_a_template_that_only_appends_is_stable(process: RenderProcess) -> None:
    diagnosis = run(process, templates.STABLE)

    assert diagnosis.exit_code == STABLE
    assert found(diagnosis) == {"tools_first"}
    assert all(shape.outcome == "kept" and shape.lost_tokens == 0 for shape in diagnosis.shapes)
    assert row(diagnosis, "plain").answer == "yes"
    assert row(diagnosis, "loop_reasoning").loop_kept == 1.0


# Appending a tool costs the conversation in each of them, but where the list moves.
@pytest.mark.parametrize(
    ("template", "mechanism", "shape"),
    [
        (templates.GENERATION_PROMPT, mechanisms.GENERATION_PROMPT, "plain"),
        (templates.TAG_BETWEEN, mechanisms.TAG_BETWEEN, "plain"),
        (templates.REASONING_DROPPED, mechanisms.REASONING_DROPPED, "inline"),
        (templates.LOOP_REASONING_DROPPED, mechanisms.LOOP_REASONING_DROPPED, "loop_reasoning"),
        (templates.EMPTY_THINKING, mechanisms.EMPTY_THINKING, "loop"),
        (templates.NEWEST_REASONING_ONLY, mechanisms.NEWEST_REASONING_ONLY, "inline"),
        (templates.TOOLS_MOVE, mechanisms.TOOLS_MOVE, "chat_tools"),
        (templates.SYSTEM_MOVES, mechanisms.SYSTEM_MOVES, "system"),
        (templates.HISTORY_CHANGED, mechanisms.HISTORY_CHANGED, "plain"),
    ],
    ids=lambda value: value.key if isinstance(value, Mechanism) else "",
)
def test_a_mechanism_that_breaks_is_named(
    process: RenderProcess, template: str, mechanism: Mechanism, shape: str
) -> None:
    diagnosis = run(process, template)

    assert diagnosis.exit_code == UNSTABLE
    assert row(diagnosis, shape).mechanisms[-1] == mechanism.key
    breaking = {key for key in found(diagnosis) if mechanisms.BY_KEY[key].breaks}
    assert breaking - ALSO.get(mechanism.key, set()) == {mechanism.key}


# A loop's reasoning is the newest reasoning of the chat that follows.
ALSO = {
    "loop_reasoning_dropped": {"reasoning_dropped"},
    "empty_thinking": {"reasoning_dropped", "loop_reasoning_dropped", "tag_between"},
    "newest_reasoning_only": {"reasoning_dropped"},
}


@pytest.mark.parametrize(
    ("template", "mechanism"),
    [
        (templates.DATE, mechanisms.DATE),
        (templates.ANSWERS_STRIPPED, mechanisms.ANSWERS_STRIPPED),
        (templates.KEY_ORDER, mechanisms.KEY_ORDER),
        (templates.KEY_ORDER, mechanisms.ENGINES_DIFFER),
        (templates.STABLE, mechanisms.TOOLS_FIRST),
        (templates.REFUSES_SYSTEM, mechanisms.REFUSED),
        (templates.SWITCHED, mechanisms.SWITCH),
    ],
    ids=lambda value: value.key if isinstance(value, Mechanism) else "",
)
def test_what_costs_only_under_a_condition_is_told_and_the_template_is_stable(
    process: RenderProcess, template: str, mechanism: Mechanism
) -> None:
    diagnosis = run(process, template)

    assert mechanism.key in found(diagnosis)
    assert diagnosis.exit_code == STABLE


class GrowingTokenizer:
    """Its marker of an answer and the first letter behind it are one token."""

    name = "growing"
    is_stand_in = False

    def encode(self, text: str) -> Ids:
        return StandIn().encode(text.replace("<|assistant|>Answer", "<|assistant_Answer|>"))


def test_a_token_that_grows_across_the_border_is_named(process: RenderProcess) -> None:
    diagnosis = run(process, templates.STABLE, GrowingTokenizer())

    assert row(diagnosis, "plain").mechanisms == ["border_token"]
    assert row(diagnosis, "plain").lost_tokens == 1


def test_a_loop_whose_reasoning_goes_keeps_what_precedes_its_first_call(process: RenderProcess) -> None:
    report = row(run(process, templates.LOOP_REASONING_DROPPED), "loop_reasoning")

    assert report.loop_kept is not None
    assert report.loop_kept < 0.2
    assert [step.difference.lost_tokens for step in report.steps[:-1]] == [0] * 6
    assert report.steps[-1].difference.lost_pages[16] == report.steps[-1].difference.lost_tokens // 16


def test_the_first_difference_is_placed_in_a_message_and_shown(process: RenderProcess) -> None:
    step = row(run(process, templates.HISTORY_CHANGED), "plain").steps[1]

    assert step.place == "behind message 2 (assistant)"
    assert step.difference.window.old.startswith("NEWEST: Question 2")
    assert step.difference.window.new.startswith("Question 2")


def test_the_switch_is_tried_at_each_value_unless_it_is_given(process: RenderProcess) -> None:
    asked = run(process, templates.SWITCHED)
    given = run(process, templates.SWITCHED, enable_thinking=False)

    assert [(shape.key, shape.outcome) for shape in asked.switches] == [
        ("enable_thinking=true", "kept"),
        ("enable_thinking=false", "tail"),
    ]
    assert given.switches == []
    assert given.exit_code == UNSTABLE


def test_a_template_that_shows_no_tools_and_no_reasoning_is_not_blamed_for_it(process: RenderProcess) -> None:
    diagnosis = run(process, templates.chat(before=""))

    assert diagnosis.exit_code == STABLE
    assert row(diagnosis, "reasoning").status == "not shown"


def test_a_template_that_refuses_everything_leaves_it_open(process: RenderProcess) -> None:
    diagnosis = run(process, templates.REFUSES_ALL)

    assert diagnosis.exit_code == CANNOT_TELL
    assert row(diagnosis, "plain").why == "TemplateError: never"


def test_a_text_that_is_no_template_is_refused(process: RenderProcess) -> None:
    with pytest.raises(TemplateRefused, match="TemplateSyntaxError"):
        run(process, templates.NO_TEMPLATE)


def test_everything_is_told_as_json(process: RenderProcess) -> None:
    told = json.loads(json.dumps(run(process, templates.TOOLS_MOVE).as_json()))

    assert told["stable"] is False
    assert {shape["shape"] for shape in told["shapes"]} >= {"plain", "loop", "loop_reasoning_text"}
    assert next(one for one in told["mechanisms"] if one["key"] == "tools_move")["advice"]
