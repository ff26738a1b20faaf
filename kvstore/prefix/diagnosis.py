"""All shapes of one template: what each costs, by which mechanism, and whether the template is stable.

for each shape       render its prompts, with and without generation prompt; compare each with the next
two clocks, permuted keys, an appended tool, blanks around an answer, another engine: compare two renderings
each value of the thinking switch: the plain chat again
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvstore.prefix import mechanisms, shapes
from kvstore.prefix.child import BARE
from kvstore.prefix.difference import PrefixDifference, compare
from kvstore.prefix.explain import DEPENDS, INSIDE, KEPT, NO, TAIL, UNKNOWN, YES, explain, items_of, shows
from kvstore.prefix.mechanisms import Mechanism
from kvstore.prefix.rendering import NOON, RenderProcess, TemplateRefused
from kvstore.prefix.shapes import ChatPrompt, ChatShape, Message
from kvstore.prefix.template import ModelTemplate

STABLE, UNSTABLE, CANNOT_TELL = 0, 1, 2  # exit codes
OK, REFUSED, NOT_SHOWN = "ok", "refused", "not shown"
DAYS_LATER = 40 * 86_400.0 + 5 * 3600.0
# Names under which chat templates of 2026 know a switch of thinking, with its values.
SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "reasoning_effort": ("low", "medium", "high"),
    "thinking_mode": ("on", "off"),
}


@dataclass(frozen=True, slots=True)
class PromptStep:
    """From one prompt to the next. turn: 1 for the first."""

    turn: int
    outcome: str
    mechanism: str | None
    place: str
    answer: str
    between: str
    difference: PrefixDifference


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """A shape's steps. status: OK; REFUSED (why says it); NOT_SHOWN: the template leaves what it is about out."""

    key: str
    title: str
    group: str
    status: str
    why: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[PromptStep] = ()
    has_loop: bool = False

    @property
    def outcome(self) -> str:
        """KEPT if each prompt is, else the worst."""
        found = {step.outcome for step in self.steps}
        return INSIDE if INSIDE in found else TAIL if TAIL in found else KEPT

    @property
    def answer(self) -> str:
        """Whether generated tokens can be used: the worst of the steps that tell."""
        found = {step.answer for step in self.steps}
        return next((one for one in (NO, DEPENDS, YES) if one in found), UNKNOWN)

    @property
    def lost_tokens(self) -> int:
        """The most that a step loses of its prompt."""
        return max((step.difference.lost_tokens for step in self.steps), default=0)

    @property
    def loop_kept(self) -> float | None:
        """Share of a tool loop's last prompt that survives the next user message."""
        return self.steps[-1].difference.kept_share if self.has_loop and self.steps else None

    @property
    def worst(self) -> PromptStep | None:
        """The step that loses most."""
        return max(self.steps, key=lambda step: (step.difference.lost_tokens, step.mechanism is not None), default=None)

    @property
    def mechanisms(self) -> list[str]:
        """Those of the steps, each once."""
        return list(dict.fromkeys(step.mechanism for step in self.steps if step.mechanism))


@dataclass(frozen=True, slots=True)
class PrefixFinding:
    """A mechanism and the shapes that show it. detail: one sentence with numbers; "" where the shape's row has them."""

    mechanism: Mechanism
    shapes: Sequence[str]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that is known of a template."""

    name: str
    tokenizer: str
    is_stand_in: bool
    notes: Sequence[str]
    block_sizes: Sequence[int]
    kwargs: Mapping[str, Any]
    shapes: Sequence[ShapeReport]
    switches: Sequence[ShapeReport]
    findings: Sequence[PrefixFinding]

    @property
    def exit_code(self) -> int:
        """STABLE, UNSTABLE, or CANNOT_TELL: the plain chat is refused."""
        if not any(shape.key == "plain" and shape.status == OK for shape in self.shapes):
            return CANNOT_TELL
        return UNSTABLE if any(finding.mechanism.breaks for finding in self.findings) else STABLE

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        shaped = [_shape_json(shape) for shape in self.shapes]
        return {
            "template": self.name,
            "tokenizer": self.tokenizer,
            "tokens_are_estimates": self.is_stand_in,
            "notes": list(self.notes),
            "chat_template_kwargs": dict(self.kwargs),
            "stable": {STABLE: True, UNSTABLE: False}.get(self.exit_code),
            "shapes": shaped,
            "thinking_switch": [_shape_json(shape) for shape in self.switches],
            "mechanisms": [
                {**asdict(finding.mechanism), "shapes": list(finding.shapes), "detail": finding.detail}
                for finding in self.findings
            ],
        }


def diagnose(
    model: ModelTemplate,
    process: RenderProcess,
    block_sizes: Sequence[int] = (16, 64, 256),
    kwargs: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Try a template on all shapes. Raises TemplateRefused if it is no template at all."""
    trial = Trial(model, process, block_sizes, kwargs or {})
    names = process.names(model.template)
    reports = trial.without_unknown_reasoning([trial.shape(shape) for shape in shapes.shapes()])
    switches = [trial.shape(shape) for shape in _switch_shapes(names, kwargs or {})]
    findings = [*_findings(reports), *trial.notes(), *_of_switches(switches)]
    return Diagnosis(
        model.name,
        model.tokenizer.name,
        model.tokenizer.is_stand_in,
        model.notes,
        block_sizes,
        kwargs or {},
        reports,
        switches,
        findings,
    )


class Trial:
    """Renders and compares for one diagnosis."""

    def __init__(
        self, model: ModelTemplate, process: RenderProcess, block_sizes: Sequence[int], kwargs: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._process = process
        self._block_sizes = block_sizes
        self._kwargs = kwargs
        self._shown_reasoning = False

    def shape(self, shape: ChatShape) -> ShapeReport:
        """Render a shape's prompts and compare each with the next."""
        kwargs = {**self._kwargs, **shape.kwargs}
        try:
            texts = [self._render(prompt, kwargs) for prompt in shape.prompts]
            if shape.prompts[0].tools and not shows(texts[-1], shapes.tools()[0]["function"]["name"]):
                return ShapeReport(shape.key, shape.title, shape.group, NOT_SHOWN, "the template shows no tools")
            bases = [self._render(prompt, kwargs, generation_prompt=False) for prompt in shape.prompts[:-1]]
        except TemplateRefused as refused:
            return ShapeReport(shape.key, shape.title, shape.group, REFUSED, str(refused), kwargs=shape.kwargs)
        self._notice_reasoning(shape, texts)
        steps = [
            self._step(
                turn, shape.prompts[turn - 1], shape.prompts[turn], texts[turn - 1], texts[turn], bases[turn - 1]
            )
            for turn in range(1, len(texts))
        ]
        return ShapeReport(
            shape.key, shape.title, shape.group, OK, kwargs=shape.kwargs, steps=steps, has_loop=shape.has_loop
        )

    def without_unknown_reasoning(self, reports: Sequence[ShapeReport]) -> list[ShapeReport]:
        """Return the reports; a template that never shows reasoning is not blamed for dropping it."""
        if self._shown_reasoning:
            return list(reports)
        dropped = mechanisms.REASONING_DROPPED.key
        return [
            ShapeReport(report.key, report.title, report.group, NOT_SHOWN, "the template never shows such reasoning")
            if report.mechanisms == [dropped]
            else replace(
                report,
                steps=[
                    replace(step, mechanism=None, answer=UNKNOWN) if step.mechanism == dropped else step
                    for step in report.steps
                ],
            )
            for report in reports
        ]

    def notes(self) -> Iterable[PrefixFinding]:
        """Compare renderings that differ in one thing which is not the conversation's growth."""
        chat = ChatPrompt([shapes.system_message(), shapes.user(0)])
        if not self._renders(chat):
            chat = ChatPrompt([shapes.user(0)])
        called = ChatPrompt(shapes.shapes()[5].prompts[1].messages, shapes.tools())
        clocks = self._both(chat, chat, "the clock", clock=NOON + DAYS_LATER)
        if clocks is not None and clocks.lost_tokens:
            yield PrefixFinding(mechanisms.DATE, ["two clocks"], _from(clocks))
        blanks = shapes.spaced()
        try:
            text = self._render(ChatPrompt(blanks), self._kwargs)
            if str(blanks[1]["content"]).strip() in text and str(blanks[1]["content"]) not in text:
                yield PrefixFinding(mechanisms.ANSWERS_STRIPPED, ["an answer with blanks at both ends"])
        except TemplateRefused:
            pass
        if not called.tools or not self._shows_tools(called):
            return
        keys = self._both(called, ChatPrompt(called.messages, shapes.permuted(list(called.tools))), "keys")
        if keys is not None and keys.lost_tokens:
            yield PrefixFinding(mechanisms.KEY_ORDER, ["permuted tool keys"], _from(keys))
        appended = self._both(called, ChatPrompt(called.messages, shapes.tools(extra=True)), "a tool more")
        if appended is not None and appended.lost_tokens:
            yield PrefixFinding(mechanisms.TOOLS_FIRST, ["an appended tool"], _from(appended))
        bare = self._both(called, called, "engine", engine=BARE)
        if bare is None or bare.lost_tokens or bare.new_tokens != bare.old_tokens:
            detail = "Jinja as it comes cannot render it" if bare is None else _from(bare)
            yield PrefixFinding(mechanisms.ENGINES_DIFFER, ["tools, in Jinja as it comes"], detail)

    def _both(self, one: ChatPrompt, other: ChatPrompt, what: str, **options: Any) -> PrefixDifference | None:
        """Compare two renderings; None if one is refused."""
        try:
            first = self._render(one, self._kwargs)
            second = self._render(other, self._kwargs, **options)
        except TemplateRefused:
            return None
        return compare(first, second, self._model.tokenizer, self._block_sizes)

    def _step(self, turn: int, old: ChatPrompt, new: ChatPrompt, old_text: str, new_text: str, base: str) -> PromptStep:
        found = explain(old_text, new_text, base, old.messages, new.messages, old.tools)
        difference = compare(old_text, new_text, self._model.tokenizer, self._block_sizes)
        mechanism, answer = found.mechanism, found.answer
        if found.outcome == KEPT and difference.lost_tokens:
            if self._model.tokenizer.is_stand_in:  # where its pieces end says nothing about the model's
                pages = dict.fromkeys(difference.lost_pages, 0)
                difference = replace(difference, common_tokens=difference.old_tokens, lost_pages=pages)
            else:
                mechanism, answer = mechanisms.BORDER_TOKEN, NO
        return PromptStep(
            turn, found.outcome, mechanism.key if mechanism else None, found.place, answer, found.between, difference
        )

    def _notice_reasoning(self, shape: ChatShape, texts: Sequence[str]) -> None:
        """Learn whether the template knows reasoning: it shows a field's, or takes it out of the content."""
        thoughts = [item for item in items_of(shape.prompts[-1].messages) if item.what == "reasoning"]
        if shape.key == "inline":
            self._shown_reasoning |= any(not shows(texts[-1], thought.text) for thought in thoughts)
        else:
            self._shown_reasoning |= any(shows(text, thought.text) for thought in thoughts for text in texts)

    def _shows_tools(self, prompt: ChatPrompt) -> bool:
        try:
            return shows(self._render(prompt, self._kwargs), prompt.tools[0]["function"]["name"])
        except TemplateRefused:
            return False

    def _renders(self, prompt: ChatPrompt) -> bool:
        try:
            return bool(self._render(prompt, self._kwargs))
        except TemplateRefused:
            return False

    def _render(self, prompt: ChatPrompt, kwargs: Mapping[str, Any], **options: Any) -> str:
        messages: Sequence[Message] = prompt.messages
        return self._process.render(self._model.template, messages, tools=prompt.tools, kwargs=kwargs, **options)


def _switch_shapes(names: Sequence[str], kwargs: Mapping[str, Any]) -> list[ChatShape]:
    plain = shapes.shapes()[0]
    return [
        ChatShape(
            f"{name}={json.dumps(value)}", f"chat, {name}={json.dumps(value)}", plain.prompts, kwargs={name: value}
        )
        for name, values in SWITCHES.items()
        if name in names and name not in kwargs
        for value in values
    ]


def _findings(reports: Sequence[ShapeReport]) -> list[PrefixFinding]:
    """Return each mechanism with its shapes, in the order of the table of mechanisms."""
    where: dict[str, list[str]] = {}
    for report in reports:
        if report.status == REFUSED:
            where.setdefault(mechanisms.REFUSED.key, []).append(report.title)
        for key in report.mechanisms:
            where.setdefault(key, []).append(report.title)
    return [PrefixFinding(one, where[one.key]) for one in mechanisms.ALL if one.key in where]


def _of_switches(switches: Sequence[ShapeReport]) -> list[PrefixFinding]:
    told = {(report.outcome, report.answer) for report in switches if report.status == OK}
    if len(told) < 2:
        return []
    rows = ", ".join(f"{report.key}: {_short(report)}" for report in switches if report.status == OK)
    return [PrefixFinding(mechanisms.SWITCH, [report.title for report in switches], rows)]


def _short(report: ShapeReport) -> str:
    if report.outcome != KEPT:
        return f"loses {report.lost_tokens} tokens and the answer"
    return "append-only" if report.answer == YES else "the answer does not follow at once"


def _from(difference: PrefixDifference) -> str:
    share, lost = 100 * difference.kept_share, difference.lost_tokens
    return f"first difference at {share:.0f} % of the prompt; {lost} of {difference.old_tokens} tokens lost"


def _shape_json(report: ShapeReport) -> dict[str, Any]:
    return {
        "shape": report.key,
        "title": report.title,
        "status": report.status,
        "why": report.why,
        "chat_template_kwargs": dict(report.kwargs),
        "append_only": report.outcome == KEPT if report.status == OK else None,
        "outcome": report.outcome if report.status == OK else None,
        "answer_reused": report.answer if report.status == OK else None,
        "lost_tokens": report.lost_tokens,
        "loop_kept_share": report.loop_kept,
        "mechanisms": report.mechanisms,
        "steps": [{**asdict(step), "lost_tokens": step.difference.lost_tokens} for step in report.steps],
    }
