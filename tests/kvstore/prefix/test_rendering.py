"""Rendering is as transformers does it, and within bounds."""

from __future__ import annotations

import sys

import pytest

from kvstore.prefix import shapes
from kvstore.prefix.rendering import Limits, RenderProcess, Template, TemplateRefused
from tests.kvstore.prefix import templates

# Reads a line and says nothing: a template that never ends, without one.
SILENT = (sys.executable, "-c", "import sys, time\nsys.stdin.readline()\ntime.sleep(600)")
QUITS = (sys.executable, "-c", "import sys\nsys.stdin.readline()")
ASK = [{"role": "user", "content": "Is the bridge open? <b>&'é"}]


@pytest.mark.parametrize(
    "text", [templates.STABLE, templates.KEY_ORDER, templates.EMPTY_THINKING, templates.TOOLS_MOVE]
)
def test_prompts_are_those_of_transformers(process: RenderProcess, text: str) -> None:
    chat_templates = pytest.importorskip("transformers.utils.chat_template_utils")
    for prompt in (shape.prompts[-1] for shape in shapes.shapes()):
        ours = process.render(Template(text), prompt.messages, tools=prompt.tools)

        theirs, _ = chat_templates.render_jinja_template(
            [list(prompt.messages)], tools=list(prompt.tools) or None, chat_template=text, add_generation_prompt=True
        )
        assert ours == theirs[0]


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("{{ messages | tojson(indent=2) }}", {}),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}", {}),
        ("{{ messages[0].content | tojson(sort_keys=true) }}{{ mode }}", {"mode": "on"}),
        ("  {% if true %}\n  x\n  {% endif %}\n", {}),
        ("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", {}),
    ],
)
def test_names_filters_and_blanks_are_those_of_transformers(
    process: RenderProcess, text: str, kwargs: dict[str, str]
) -> None:
    chat_templates = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{**ASK[0], "reasoning": "it is noon"}]

    theirs, _ = chat_templates.render_jinja_template([messages], chat_template=text, **kwargs)

    assert process.render(Template(text), messages, generation_prompt=False, kwargs=kwargs) == theirs[0]


def test_a_template_that_takes_too_long_is_ended() -> None:
    times = iter([0.0, 1000.0, 1000.0])  # asked, when an answer is looked for, and when there is none
    process = RenderProcess(Limits(seconds=5.0), command=SILENT, now=lambda: next(times))

    with process, pytest.raises(TemplateRefused, match="no text after 5 s") as refused:
        process.render(Template("x"), ASK)

    assert refused.value.kind == "too_slow"


def test_after_three_renderings_that_take_too_long_none_is_tried_for_a_minute() -> None:
    tried = [time for start in (0.0, 1000.0, 2000.0) for time in (start, start + 1000.0, start + 1000.0)]
    times = iter([*tried, 3001.0, 3059.0, 3061.0, 3061.0, 4061.0, 4061.0])
    told = []

    with RenderProcess(Limits(seconds=5.0), command=SILENT, now=lambda: next(times)) as process:
        for _ in range(6):
            with pytest.raises(TemplateRefused) as refused:
                process.render(Template("x"), ASK)
            told.append(str(refused.value))

    waited, not_tried = "no text after 5 s", "not tried: 3 renderings in a row took longer than 5 s"
    assert told == [waited, waited, waited, not_tried, not_tried, waited]
    assert next(times, None) is None


def test_a_process_that_ends_is_told_and_replaced() -> None:
    with RenderProcess(command=QUITS) as process:
        for _ in range(2):
            with pytest.raises(TemplateRefused, match="has ended"):
                process.render(Template("x"), ASK)


def test_a_template_that_writes_too_much_is_refused() -> None:
    with RenderProcess(Limits(max_chars=50)) as process:
        with pytest.raises(TemplateRefused, match="more than 50 characters") as refused:
            process.render(Template("{% for i in range(20) %}12345{% endfor %}"), ASK)

        assert process.render(Template("short"), ASK) == "short"
    assert refused.value.kind == "too_long"


def test_a_template_that_raises_says_so(process: RenderProcess) -> None:
    with pytest.raises(TemplateRefused, match="TemplateError: roles must alternate") as refused:
        process.render(Template("{{ raise_exception('roles must alternate') }}"), ASK)

    assert refused.value.kind == "raised"


def test_the_clock_is_the_one_that_is_given(process: RenderProcess) -> None:
    assert process.render(Template("{{ strftime_now('%Y-%m-%d') }}"), ASK, clock=86_400.0) == "1970-01-02"


def test_a_template_cannot_reach_what_is_behind_its_values(process: RenderProcess) -> None:
    with pytest.raises(TemplateRefused, match="SecurityError"):
        process.render(Template("{{ messages.__class__.__mro__ }}"), ASK)
