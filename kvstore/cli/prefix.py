"""`kvstore prefix`: does a chat template, or one's traffic, keep its prefixes? What breaks them, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore.console import console
from kvstore.errors import ConfigError
from kvstore.extras import require

MAX_BLOCK = 1 << 20
MAX_BAD_LINES = 20  # told each; the others are counted
CANNOT_TELL = 2


def prefix(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL_OR_TEMPLATE | diff A.json B.json",
            help="A model or tokenizer directory, a hub id, or a .jinja file; with --log, the template of the "
            "requests. diff: two requests.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR_OR_ID", help="Count tokens by another tokenizer.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", metavar="DIR_OR_ID", help="diff: the template for both requests."),
    ] = None,
    block_size: Annotated[
        str, typer.Option("--block-size", metavar="N,N", help="Count lost pages of so many tokens.")
    ] = "16,64,256",
    kwargs: Annotated[
        str, typer.Option("--kwargs", metavar="JSON", help="chat_template_kwargs, e.g. '{\"enable_thinking\": false}'.")
    ] = "{}",
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="OpenAI-style requests, one JSON object a line.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.01, help="The longest that one rendering may take.")
    ] = 10.0,
) -> None:
    """Find what breaks prefixes: in a model's chat template, in a log of requests, or between two requests.

    A cache reuses a prompt only up to the first token that differs. A template that rewrites earlier turns
    (thinking that is dropped, a tool list that moves, a date) takes hits away without a word. This renders
    conversations turn by turn and tells the tokens and pages that each turn loses, whether generated tokens can
    ever hit, what a tool loop leaves behind, the mechanism by name, and what to do about it.

    \b
      kvstore prefix ./Qwen3-0.6B                      a model directory, with its own tokenizer
      kvstore prefix chat_template.jinja               a file; tokens are then estimates
      kvstore prefix MODEL --kwargs '{"enable_thinking": false}'
      kvstore prefix --log requests.jsonl ./Qwen3-0.6B where real sessions left their prefix
      kvstore prefix diff a.json b.json --template ./Qwen3-0.6B
                                                       why did this prompt miss?

    Exit code 0: stable. 1: not. 2: cannot tell. A template is a program: it runs in a sandbox, in a process that
    is ended after --timeout seconds.
    """
    require("prefix", "kvstore prefix")
    sizes, given = _sizes(block_size), _kwargs(kwargs)
    words = what or []
    from kvstore.prefix.rendering import Limits, RenderProcess

    with RenderProcess(Limits(seconds=timeout_s)) as process:
        code, made = _run(words, log, template, tokenizer, process, sizes, given)
    if json_file is not None:
        json_file.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    if code:
        raise typer.Exit(code)


def _run(
    words: list[str],
    log: Path | None,
    template: str | None,
    tokenizer: str | None,
    process: Any,
    sizes: tuple[int, ...],
    kwargs: dict[str, Any],
) -> tuple[int, dict[str, Any]]:
    """Return the exit code and what is known, printed already."""
    from kvstore.cli import prefix_view as view
    from kvstore.prefix.answer_trials import learn
    from kvstore.prefix.answers import AnswerRules
    from kvstore.prefix.diagnosis import diagnose
    from kvstore.prefix.rendering import TemplateRefused
    from kvstore.prefix.template import load

    if log is not None:
        return _of_log(log, words, tokenizer, process, sizes)
    if words[:1] == ["diff"]:
        return _of_diff(words[1:], template, tokenizer, process, sizes)
    if len(words) != 1:
        raise ConfigError("name one model, directory or template; see kvstore prefix --help")
    model = load(words[0], tokenizer)
    try:
        diagnosis = diagnose(model, process, sizes, kwargs)
    except TemplateRefused as refused:
        raise ConfigError(f"{words[0]} is no chat template: {refused}") from None
    told = diagnosis.exit_code != CANNOT_TELL
    answers = learn(model, process, kwargs, estimates=True) if told else AnswerRules((), (), "")
    view.print_diagnosis(console(), diagnosis, answers)
    return diagnosis.exit_code, {**diagnosis.as_json(), "saved_answers": answers.why if answers.turns else None}


def _of_log(
    log: Path, words: list[str], tokenizer: str | None, process: Any, sizes: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    from kvstore.cli import prefix_view as view
    from kvstore.prefix.requests import ChatRequest, read_log
    from kvstore.prefix.traffic import Traffic

    if len(words) > 1:
        raise ConfigError("--log takes one template, or none")
    traffic = Traffic(_model(words[0] if words else None, tokenizer), process, block_sizes=sizes)
    bad: list[dict[str, Any]] = []
    num_bad = 0
    with log.open("rb") as lines:
        for number, request in read_log(lines):
            if isinstance(request, ChatRequest):
                traffic.observe(request, f"line {number}")
            else:
                num_bad += 1
                bad += [{"line": number, "reason": request}] if len(bad) < MAX_BAD_LINES else []
    report = {**traffic.report(), "bad_lines": num_bad, "first_bad_lines": bad}
    view.print_traffic(console(), report)
    if not report["turns"]:
        return CANNOT_TELL, report
    return int(report["lost_tokens"] > 0), report


def _of_diff(
    files: list[str], template: str | None, tokenizer: str | None, process: Any, sizes: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    from dataclasses import asdict

    from kvstore.cli import prefix_view as view
    from kvstore.errors import RequestError
    from kvstore.prefix.rendering import TemplateRefused
    from kvstore.prefix.requests import parse
    from kvstore.prefix.traffic import Traffic

    if len(files) != 2:
        raise ConfigError("write kvstore prefix diff A.json B.json")
    model = _model(template, tokenizer)
    traffic = Traffic(model, process, block_sizes=sizes)

    def render(file: str) -> Any:
        try:
            return traffic.render(parse(json.loads(Path(file).read_bytes())))
        except (RequestError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is no request: {str(error)[:200]}") from None
        except TemplateRefused as error:
            raise ConfigError(f"{file}: the template refuses it: {error}") from None

    turn = traffic.compare(*map(render, files))
    view.print_turn(console(), model, turn)
    made = {
        "mechanism": turn.mechanism.key if turn.mechanism else None,
        "advice": turn.mechanism.advice if turn.mechanism else "",
        "place": turn.explanation.place if turn.explanation else "",
        "answer_reused": turn.explanation.answer if turn.explanation else None,
        "lost_tokens": turn.difference.lost_tokens,
        **asdict(turn.difference),
    }
    return int(turn.difference.lost_tokens > 0), made


def _model(source: str | None, tokenizer: str | None) -> Any:
    from kvstore.prefix.template import load, plain

    return plain(tokenizer) if source is None else load(source, tokenizer)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(one) for one in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(1 <= size <= MAX_BLOCK for size in sizes):
        raise ConfigError(f"--block-size is {text!r}; it must be numbers from 1 to {MAX_BLOCK}, such as 16,64")
    return tuple(dict.fromkeys(sizes))


def _kwargs(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--kwargs is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--kwargs is {text[:80]!r}; it must be a JSON object")
    return value
