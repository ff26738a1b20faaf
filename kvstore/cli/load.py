"""`kvstore load`: play a workload against a server and tell what its cache did."""

from __future__ import annotations

import textwrap
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.command import Command
from kvstore.console import console
from kvstore.errors import ConfigError, KVStoreError
from kvstore.extras import how_to_install, missing

if TYPE_CHECKING:
    from kvstore.load.arrivals import Arrivals
    from kvstore.load.player import Asking
    from kvstore.load.requests import Workload

EXIT_FAILED = 1  # requests failed, or answers differ
EXIT_INTERRUPTED = 130
DEFAULT_CONCURRENCY = 2

# Headings of the help's options
WHEN, WHAT, HOW = "When requests are sent", "Parameters of the workload", "How they are put"

HELP = """
Play a workload against an OpenAI-compatible server and report TTFT, hit rate by tier, tokens/s and errors.

\b
Workloads, their options and defaults:
{workloads}
\b
Token counts of made-up text are approximate; the report has those of the server.

\b
Examples:
  kvstore load --workload shared-prompt --baseline
      questions below one system prompt, with the cache and without it
  kvstore load -w multi-round --users 8 --rate 0.5 --json a.json --png a.png
      8 conversations; a request every 2 s on average, answered or not
  kvstore load -w long-doc --documents 6 --order random --hit-ratio 0.5
  kvstore load -w trace --trace conv.kvt.zst --block-tokens 16 --rate 1
      a recorded trace, each of its 512-token blocks played as 16 tokens
  kvstore load --url http://a:8000 --plain --baseline-url http://b:8000
      two servers of any make, one with a prefix cache and one without

\b
A second run with the same --seed finds its prompts in the cache from the
first request on; a new seed starts cold. In an open loop TTFT counts from
the time a request was due, sent or not. Ctrl-C prints what there is so far.
Exit code 1: requests failed, or texts with and without the cache differ.
"""


def load(
    workload: Annotated[
        str, typer.Option("--workload", "-w", metavar="NAME", help="What to play: see above.")
    ] = "shared-prompt",
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="The server: a router, a replica, or another make.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Which model; the first one listed, unless given.")
    ] = "",
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Then play the same without the cache; compare times and texts.")
    ] = False,
    baseline_url: Annotated[
        str, typer.Option("--baseline-url", metavar="URL", help="Play the baseline against this server.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers, each request's too.")
    ] = None,
    png_file: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw a picture.")] = None,
    # when
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            metavar="N",
            help=f"Closed loop: N requests at a time; {DEFAULT_CONCURRENCY} unless given.",
            rich_help_panel=WHEN,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate", "-r", metavar="R", help="Open loop: R requests/s, Poisson arrivals.", rich_help_panel=WHEN
        ),
    ] = None,
    trace_times: Annotated[
        bool, typer.Option("--trace-times", help="Open loop: at the trace's own times.", rich_help_panel=WHEN)
    ] = False,
    speedup: Annotated[
        float | None,
        typer.Option("--speedup", metavar="X", help="The trace's times, X times as fast.", rich_help_panel=WHEN),
    ] = None,
    warmup: Annotated[
        int,
        typer.Option("--warmup", metavar="N", help="N short requests before, not counted.", rich_help_panel=WHEN),
    ] = 4,
    # what
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Equal seeds make equal requests.", rich_help_panel=WHAT)
    ] = 0,
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", metavar="N", help="How many.", rich_help_panel=WHAT)
    ] = None,
    users: Annotated[
        int | None, typer.Option("--users", metavar="N", help="Conversations at once.", rich_help_panel=WHAT)
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="Questions of each user.", rich_help_panel=WHAT)
    ] = None,
    documents: Annotated[
        int | None, typer.Option("--documents", metavar="N", help="Different documents.", rich_help_panel=WHAT)
    ] = None,
    asks: Annotated[
        int | None, typer.Option("--asks", metavar="N", help="Questions about each document.", rich_help_panel=WHAT)
    ] = None,
    order: Annotated[
        str | None,
        typer.Option("--order", metavar="NAME", help="tile, random or interleave.", rich_help_panel=WHAT),
    ] = None,
    hit_ratio: Annotated[
        float | None,
        typer.Option(
            "--hit-ratio", metavar="X", help="Share of later questions that can hit, 0 to 1.", rich_help_panel=WHAT
        ),
    ] = None,
    system_tokens: Annotated[
        int | None,
        typer.Option("--system-tokens", metavar="N", help="The shared system prompt.", rich_help_panel=WHAT),
    ] = None,
    history_tokens: Annotated[
        int | None,
        typer.Option("--history-tokens", metavar="N", help="Each user's own first text.", rich_help_panel=WHAT),
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option("--document-tokens", metavar="N", help="Each document.", rich_help_panel=WHAT)
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", metavar="N", help="Each prompt.", rich_help_panel=WHAT)
    ] = None,
    question_tokens: Annotated[
        int | None, typer.Option("--question-tokens", metavar="N", help="Each question.", rich_help_panel=WHAT)
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option("--answer-tokens", metavar="N", help="Asked for each time.", rich_help_panel=WHAT)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="kvt1 or Azure CSV, also .zst.", rich_help_panel=WHAT),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", metavar="N", help="Cut a trace's longer prompts.", rich_help_panel=WHAT),
    ] = None,
    max_answer_tokens: Annotated[
        int | None,
        typer.Option("--max-answer-tokens", metavar="N", help="Cut a trace's longer answers.", rich_help_panel=WHAT),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(
            "--block-tokens", metavar="N", help="Play a trace's blocks as N tokens; 0: its own.", rich_help_panel=WHAT
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="A trace's token ids stay below N.", rich_help_panel=WHAT),
    ] = None,
    # how
    api: Annotated[
        str | None,
        typer.Option(
            "--api", metavar="NAME", help="completions, for a model without chats; chat.", rich_help_panel=HOW
        ),
    ] = None,
    api_key: Annotated[
        str,
        typer.Option("--api-key", metavar="KEY", envvar="KVSTORE_LOAD_API_KEY", help="A key.", rich_help_panel=HOW),
    ] = "",
    tenant: Annotated[
        str, typer.Option("--tenant", metavar="NAME", help="Whose cache to use.", rich_help_panel=HOW)
    ] = "",
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Only what OpenAI's API has: no ignore_eos, no kvstore.", rich_help_panel=HOW),
    ] = False,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--stop-at-eos", help="Whether all answers have their full length.", rich_help_panel=HOW
        ),
    ] = True,
    on_refusal: Annotated[
        str,
        typer.Option(
            "--on-refusal",
            metavar="retry|count",
            help="After a 429: come back when told, or go on.",
            rich_help_panel=HOW,
        ),
    ] = "retry",
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", metavar="S", help="Seconds for one request, retries included.", rich_help_panel=HOW),
    ] = 600.0,
) -> None:
    """Play a workload against an OpenAI-compatible server and report TTFT, hit rate by tier and errors."""
    options = dict(locals())
    for option, number, least in (("--seed", seed, 0), ("--warmup", warmup, 0), ("--timeout", timeout_s, 0.001)):
        if not number >= least:
            raise ConfigError(f"{option} {number} is too small; it must be at least {least}")
    given = {name: value for name, value in options.items() if name in _RECIPE_OPTIONS and value is not None}
    made = _make_workload(workload, trace, given, seed)
    arrivals = _arrivals(made, concurrency, rate, trace_times, speedup, seed)
    asking = _asking(made, api, plain, tenant, ignore_eos)
    if on_refusal not in ("retry", "count"):
        raise ConfigError(f"on-refusal {on_refusal!r} is unknown; it is retry or count")
    if png_file is not None:
        _need_matplotlib()
    for file in (json_file, png_file):
        if file is not None and file.parent != Path() and not file.parent.is_dir():
            raise ConfigError(f"{file}: the directory {file.parent} is not there; make it first")

    from kvstore.lab.machine import machine, versions
    from kvstore.load.client import Client
    from kvstore.load.session import HttpSession

    server, other = (
        Client(base, model=model, api_key=api_key, on_refusal=on_refusal, timeout_s=timeout_s, now=time.perf_counter)
        for base in (url, baseline_url)
    )
    session = HttpSession(
        made, arrivals, asking, server, other if baseline_url else None, baseline or bool(baseline_url), warmup
    )
    session.play(console(stderr=True))
    session.print(console())
    if json_file is not None:
        session.write_json(json_file, {"machine": machine(), "versions": versions()})
    if png_file is not None:
        session.draw(png_file)
    if session.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not session.succeeded:
        raise typer.Exit(EXIT_FAILED)


class LoadCommand(Command):
    """A command whose help lists the workloads, which are imported only when somebody asks."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        self.help = make_help()
        super().format_help(ctx, formatter)


_RECIPE_OPTIONS = (
    "requests", "users", "rounds", "documents", "asks", "order", "hit_ratio", "system_tokens", "history_tokens",
    "document_tokens", "prompt_tokens", "question_tokens", "answer_tokens", "max_prompt_tokens", "max_answer_tokens",
    "block_tokens", "vocab_size",
)  # fmt: skip


def _make_workload(name: str, trace: Path | None, given: dict[str, Any], seed: int) -> Workload:
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"workload {name!r} is unknown; it is one of {', '.join(recipes)}")
    if (name == "trace") != (trace is not None):
        what = "workload trace needs --trace FILE" if trace is None else f"--trace means nothing to {name}"
        raise ConfigError(f"{what}; write kvstore load --workload trace --trace {trace or 'FILE'}")
    known = [field.name for field in fields(recipes[name]) if field.name != "path"]
    for option in given:
        if option not in known:
            takes = ", ".join(_option(field) for field in known)
            raise ConfigError(f"{_option(option)} means nothing to workload {name}; it takes {takes}")
    made: Workload = recipes[name](**({"path": trace} if trace else {}), **given).make(seed)
    return made


def _arrivals(
    workload: Workload,
    concurrency: int | None,
    rate: float | None,
    trace_times: bool,
    speedup: float | None,
    seed: int,
) -> Arrivals:
    from kvstore.load.arrivals import Closed, poisson
    from kvstore.load.arrivals import trace_times as times_of

    chosen = [
        name
        for name, is_given in (
            ("--concurrency", concurrency is not None),
            ("--rate", rate is not None),
            ("--trace-times", trace_times),
        )
        if is_given
    ]
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join(chosen)} exclude each other: requests are sent either when others are answered "
            "(--concurrency) or at times of their own (--rate, --trace-times); give one"
        )
    if speedup is not None and not trace_times:
        raise ConfigError("--speedup is for --trace-times; give both or neither")
    if trace_times:
        return times_of(workload, 1.0 if speedup is None else speedup)
    if rate is not None:
        return poisson(len(workload.requests), rate, seed)
    return Closed(DEFAULT_CONCURRENCY if concurrency is None else concurrency)


def _asking(workload: Workload, api: str | None, plain: bool, tenant: str, ignore_eos: bool) -> Asking:
    from kvstore.load.player import Asking
    from kvstore.load.requests import CHAT, COMPLETIONS

    if api not in (None, CHAT, COMPLETIONS):
        raise ConfigError(f"api {api!r} is unknown; it is {CHAT} or {COMPLETIONS}")
    if plain and tenant:
        raise ConfigError("--tenant is not in OpenAI's API; leave out --plain or --tenant")
    return Asking(api or workload.api, plain, tenant=tenant, ignore_eos=ignore_eos)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KVStoreError(f"--png needs matplotlib; {how_to_install('demo', missing('demo'))}") from error


def _recipes() -> dict[str, type[Any]]:
    from kvstore.load.trace import Trace
    from kvstore.load.workloads import RECIPES

    return {**RECIPES, "trace": Trace}


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def make_help() -> str:
    """HELP with every workload's own options and defaults."""
    lines = []
    for name, recipe in _recipes().items():
        summary = (recipe.__doc__ or "").split(":")[0].split(".")[0].splitlines()[0]
        options = " ".join(
            f"{_option(field.name)} {field.default}" for field in fields(recipe) if field.default is not MISSING
        )
        lines += [f"  {name}: {summary[0].lower()}{summary[1:]}"]
        lines += textwrap.wrap(options, 76, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return HELP.format(workloads="\n".join(lines))
