"""How the reports of `kvstore prefix` look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.console import add_row, table

if TYPE_CHECKING:
    from rich.console import Console

    from kvstore.prefix.diagnosis import Diagnosis, ShapeReport
    from kvstore.prefix.difference import Window

VERDICTS = {0: "stable: every turn begins with the prompt before it", 1: "not stable", 2: "cannot tell"}
OUTCOMES = {"kept": "yes", "tail": "no, its end", "inside": "no, inside"}
ANSWERS = {"depends": "if it writes the tag", "unknown": "-"}
SHOWN_CHARS = 46


def print_diagnosis(output: Console, diagnosis: Diagnosis) -> None:
    """Print a template's report: a row for each shape, the first difference of each mechanism, and advice."""
    from rich.text import Text

    output.print(Text(f"{diagnosis.name}: {VERDICTS[diagnosis.exit_code]}", style="bold"))
    if diagnosis.is_stand_in:
        output.print("Tokens are estimates of a stand-in; give --tokenizer for the model's own.", markup=False)
    sizes = [str(size) for size in diagnosis.block_sizes]
    pages = f"pages lost at {'/'.join(sizes)}"
    numbers = ("tokens lost", pages, "loop kept")
    rows = table("conversation", "append-only", *numbers, "answer reused", "first difference", right=numbers)
    for report in [*diagnosis.shapes, *diagnosis.switches]:
        _add_shape(rows, report)
    output.print(rows)
    for finding in diagnosis.findings:
        mechanism = finding.mechanism
        output.print(Text(mechanism.title, style="bold red" if mechanism.breaks else "bold yellow"))
        output.print(f"  in: {', '.join(finding.shapes)}", markup=False)
        output.print(f"  costs: {mechanism.cost}", markup=False)
        if finding.detail:
            output.print(f"  here: {finding.detail}", markup=False)
        _print_example(output, diagnosis, mechanism.key)
        output.print(f"  do: {mechanism.advice}", markup=False)


def print_window(output: Console, window: Window) -> None:
    """Print the text around a difference, white space made visible."""
    output.print(f"  both ...{visible(window.shared[-SHOWN_CHARS:])}", markup=False)
    output.print(f"  old     {visible(window.old[:SHOWN_CHARS]) or '(ends)'}", markup=False)
    output.print(f"  new     {visible(window.new[:SHOWN_CHARS]) or '(ends)'}", markup=False)


def visible(text: str) -> str:
    """Return a text in one line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _add_shape(rows: object, report: ShapeReport) -> None:
    step = report.worst
    if report.status != "ok" or step is None:
        cells: Sequence[str] = (report.title, report.status, "", "", "", "", visible(report.why)[:60])
    else:
        pages = "/".join(
            str(max(one.difference.lost_pages[size] for one in report.steps)) for size in step.difference.lost_pages
        )
        kept = "" if report.loop_kept is None else f"{100 * report.loop_kept:.0f} %"
        answer = ANSWERS.get(report.answer, report.answer)
        cells = (report.title, OUTCOMES[report.outcome], str(report.lost_tokens), pages, kept, answer, step.place)
    add_row(rows, *cells)  # type: ignore[arg-type]


def _print_example(output: Console, diagnosis: Diagnosis, key: str) -> None:
    """Print the window of the first step that a mechanism explains."""
    for report in diagnosis.shapes:
        for step in report.steps:
            if step.mechanism == key:
                if step.between:
                    output.print(f"  between prompt and answer: {visible(step.between[:120])}", markup=False)
                elif step.difference.lost_tokens:
                    print_window(output, step.difference.window)
                return
