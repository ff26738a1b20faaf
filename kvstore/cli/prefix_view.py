"""How the reports of `kvstore prefix` look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.console import add_row, table
from kvstore.prefix.difference import Window

if TYPE_CHECKING:
    from rich.console import Console

    from kvstore.prefix.answers import AnswerRules
    from kvstore.prefix.diagnosis import Diagnosis, ShapeReport
    from kvstore.prefix.template import ModelTemplate
    from kvstore.prefix.traffic import SessionTurn

VERDICTS = {0: "stable: every turn begins with the prompt before it", 1: "not stable", 2: "cannot tell"}
OUTCOMES = {"kept": "yes", "tail": "no, its end", "inside": "no, inside"}
ANSWERS = {"depends": "if it writes the tag", "unknown": "-"}
SHOWN_CHARS = 46


def print_diagnosis(output: Console, diagnosis: Diagnosis, answers: AnswerRules) -> None:
    """Print a template's report: a row for each shape, the answers worth saving, each mechanism with advice."""
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
    if answers.turns:
        output.print(f'"save": "auto" saves of answers: {answers.why}', markup=False)
    for finding in diagnosis.findings:
        mechanism = finding.mechanism
        output.print(Text(mechanism.title, style="bold red" if mechanism.breaks else "bold yellow"))
        output.print(f"  in: {', '.join(finding.shapes)}", markup=False)
        output.print(f"  costs: {mechanism.cost}", markup=False)
        if finding.detail:
            output.print(f"  here: {finding.detail}", markup=False)
        _print_example(output, diagnosis, mechanism.key)
        output.print(f"  do: {mechanism.advice}", markup=False)


def print_traffic(output: Console, report: dict[str, Any]) -> None:
    """Print what a log's sessions lost: a row for each shape and mechanism, an example of each, and advice."""
    from rich.text import Text

    from kvstore.prefix.mechanisms import BY_KEY

    head = f"{report['requests']} requests, {report['sessions']} sessions, {report['turns']} turns that follow another"
    output.print(Text(head, style="bold"))
    estimates = " (estimates of a stand-in)" if report["tokens_are_estimates"] else ""
    output.print(f"template {report['template']}, tokens by {report['tokenizer']}{estimates}", markup=False)
    output.print(
        f"{report['prompt_tokens']} prompt tokens: {report['prefix_tokens']} begin as a prompt before them; "
        f"{report['repeated_elsewhere_tokens']} repeat one elsewhere, where no prefix cache reaches them",
        markup=False,
    )
    numbers = ("turns", "tokens lost", "per turn")
    rows = table("conversation", "prefix", *numbers, right=numbers)
    for group in report["groups"]:
        title = "kept" if group["mechanism"] == "kept" else BY_KEY[group["mechanism"]].title
        each = f"{group['lost_tokens'] / group['turns']:.0f}"
        add_row(rows, group["shape"], title, str(group["turns"]), str(group["lost_tokens"]), each)
    output.print(rows)
    for key, found in report["examples"].items():
        if key in BY_KEY:
            output.print(Text(BY_KEY[key].title, style="bold red" if BY_KEY[key].breaks else "bold yellow"))
            for one in found[:1]:
                where = f", {one['place']}" if one["place"] else ""
                output.print(f"  {one['at']}{where}: {one['lost_tokens']} tokens", markup=False)
                print_window(output, Window(one["shared"], one["old"], one["new"]))
            output.print(f"  do: {BY_KEY[key].advice}", markup=False)
    for refused in report["first_refused"]:
        output.print(f"{refused['at']} is refused by the template: {visible(refused['reason'])}", markup=False)
    if report["refused"] > len(report["first_refused"]):
        output.print(f"{report['refused']} requests are refused by the template", markup=False)
    for bad in report["first_bad_lines"]:
        output.print(f"line {bad['line']} is no request: {bad['reason']}", markup=False)
    if report["bad_lines"] > len(report["first_bad_lines"]):
        output.print(f"{report['bad_lines']} lines are no requests", markup=False)


def print_turn(output: Console, model: ModelTemplate, turn: SessionTurn) -> None:
    """Print where the second of two requests leaves the first."""
    from rich.text import Text

    difference = turn.difference
    estimates = " (estimates of a stand-in)" if model.tokenizer.is_stand_in else ""
    pages = ", ".join(f"{lost} of {size}" for size, lost in difference.lost_pages.items())
    title = turn.mechanism.title if turn.mechanism else "the second prompt begins with the first"
    output.print(Text(title, style="bold"))
    output.print(
        f"{difference.common_tokens} of {difference.old_tokens} tokens are shared{estimates}; lost pages: {pages}",
        markup=False,
    )
    if turn.explanation and turn.explanation.place:
        output.print(f"first difference: {turn.explanation.place}", markup=False)
    if turn.explanation and turn.explanation.between:
        output.print(f"between prompt and answer: {visible(turn.explanation.between[:120])}", markup=False)
    if difference.lost_tokens:
        print_window(output, difference.window)
    if turn.mechanism:
        output.print(f"do: {turn.mechanism.advice}", markup=False)


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
