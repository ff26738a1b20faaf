"""`kvstore replay TRACE...`: what a store of some size and policy would have hit of recorded traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.console import add_row, console, print_json, table
from kvstore.errors import ConfigError
from kvstore.extras import require
from kvstore.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from kvstore.lab.sweep import ReplayCell
    from kvstore.lab.traces import ReplayTrace

TIERS, COST = "Tiers and replicas", "Cost model"
NUMBERS = (
    "blocks",
    "of all",
    "token hit rate",
    "computed tokens",
    "of LRU's",
    "gap closed",
    "time saved",
    "TTFT p50",
    "p95",
)


def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="kvt1, Mooncake or Bailian; .gz, .zst too.")],
    capacity: Annotated[
        str, typer.Option(help="Of host memory: 5% of the trace's blocks, 20000 blocks, 3Mtokens or 64GiB; a list.")
    ] = "1%,5%,10%,25%",
    policy: Annotated[str, typer.Option(help="Policies beside LRU; a list, package.module:Class too.")] = "lru",
    ttl: Annotated[str | None, typer.Option(help="Time to live since the last use, such as 5min.")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block, where it is not the usual.")] = None,
    bytes_per_token: Annotated[
        int | None, typer.Option(min=1, help="Of a model's KV, for capacities in bytes.")
    ] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Read the first ones only.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave broken lines out, and count them.")] = False,
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Of the traces, where the first line is not to say.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="For traces that hold prompts as text.")
    ] = None,
    write_kvt: Annotated[
        Path | None, typer.Option("--write-kvt", metavar="FILE", help="Only write the trace as kvt1 (.zst, .gz too).")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Room of a disk tier, as of --capacity.", rich_help_panel=TIERS)
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Room of a Redis tier.", rich_help_panel=TIERS)] = None,
    exclusive: Annotated[bool, typer.Option(help="A block is in one tier at a time.", rich_help_panel=TIERS)] = False,
    admit: Annotated[str, typer.Option(help="Of lower tiers: always, second_use.", rich_help_panel=TIERS)] = "always",
    writes_per_day: Annotated[
        str | None, typer.Option(help="Most that is written to disk a day, as of --capacity.", rich_help_panel=TIERS)
    ] = None,
    hints: Annotated[
        str, typer.Option(help="Share of requests whose clients give hints (docs/hints.md), such as 25%; a list.")
    ] = "0%",
    replicas: Annotated[int, typer.Option(min=1, help="Stores, each with such tiers.", rich_help_panel=TIERS)] = 1,
    routing: Annotated[
        str, typer.Option(help="Of requests to replicas: prefix, round_robin.", rich_help_panel=TIERS)
    ] = "prefix",
    pooled: Annotated[bool, typer.Option(help="The replicas share one store.", rich_help_panel=TIERS)] = False,
    model: Annotated[
        str, typer.Option(help="A preset, or a config.json; a wrong name shows the list.", rich_help_panel=COST)
    ] = "llama-3-8b",
    gpu: Annotated[str, typer.Option(help="a100, l40s, h100, h200, b200.", rich_help_panel=COST)] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one replica.", rich_help_panel=COST)] = 1,
    media: Annotated[
        str | None,
        typer.Option(
            help="As host=dram,disk=2nvme,redis=redis-100g; a wrong name shows the list.", rich_help_panel=COST
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, planner (every policy) or compiled (fast).")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one record for each row.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw hit rate over capacity (PNG).")] = None,
) -> None:
    """Replay traffic through the store's own planner and policies, under the trace's own clock.

    Beside each policy stand LRU, the policy to beat, and the offline optimum, which knows the future: how much of the
    way from one to the other a policy goes is what it is worth. Look at computed tokens, too: where nearly all is hit,
    a fall of 0.2 points is 5 % more to compute.

    For example: kvstore replay conversation_trace.jsonl --capacity 1%,5%,25% --policy sieve,s3fifo --plot rates.png
    """
    from kvstore.lab import compiled
    from kvstore.lab.geometry import find_geometry
    from kvstore.lab.hardware import find_gpu, media_of
    from kvstore.lab.player import Player
    from kvstore.lab.setup import ADMISSIONS, DISK, HOST, REDIS, ROUTINGS, Setup
    from kvstore.lab.sweep import LRU, parse_capacity, sweep
    from kvstore.lab.timing import PrefillModel
    from kvstore.lab.traces import read_trace

    ttl_s = None if ttl is None else _seconds(ttl)
    shares = [_share(text) for text in dict.fromkeys(_words(hints))]
    policies = list(dict.fromkeys([LRU, *_words(policy)]))
    for name in policies:
        _check_policy(name)
    _check_word("--admit", admit, ADMISSIONS)
    _check_word("--routing", routing, ROUTINGS)
    if disk is None and redis is None and (exclusive or writes_per_day is not None):
        raise ConfigError("--exclusive and --writes-per-day are about tiers below host memory; give --disk or --redis")
    geometry, lower = find_geometry(model), {DISK: disk, REDIS: redis}
    names = (HOST, *(name for name, room in lower.items() if room is not None))
    costs = PrefillModel(geometry, find_gpu(gpu), media_of(names, media or ""), gpus)
    token_bytes = bytes_per_token or geometry.token_bytes
    if plot is not None:
        require("demo", "--plot")
    cells: list[ReplayCell] = []
    progress = console(stderr=True)
    if not compiled.is_built:
        progress.print("the compiled engine is not built here: the planner replays, about 10 us a block reference")
    with progress.status("") as status:
        for path in traces:
            status.update(f"reading {path}")
            trace = read_trace(
                path,
                format_name=format_name,
                block_tokens=block_size,
                max_requests=max_requests,
                skip_bad=skip_bad,
                tokenizer=tokenizer,
                on_progress=status.update,
            )
            for note in trace.notes:
                progress.print(f"{path}: {note}", markup=False, soft_wrap=True)
            if write_kvt is not None:
                _write(trace, write_kvt, len(traces))
                continue
            capacities = sorted({parse_capacity(text, trace, token_bytes) for text in _words(capacity)})
            rooms = [(n, parse_capacity(room, trace, token_bytes)) for n, room in lower.items() if room is not None]
            base = Setup(
                ((HOST, 1), *rooms),
                ttl_s=ttl_s,
                is_exclusive=exclusive,
                admit=admit,
                writes_per_day=None if writes_per_day is None else parse_capacity(writes_per_day, trace, token_bytes),
                replicas=replicas,
                routing=routing,
                is_pooled=pooled,
            )
            player = Player(trace, engine)
            found = list(sweep(player, costs, capacities, policies, base, on_step=status.update, hints=shares))
            cells += found
            if not as_json:
                _print(trace, found)
    records = [cell.as_record() for cell in cells]
    if out is not None:
        out.write_text(json.dumps(records, indent=2) + "\n")
    if plot is not None:
        from kvstore.lab.sweep_plot import draw_rates

        draw_rates(cells, plot)
        progress.print(f"plot: {plot}")
    if as_json:
        print_json(records)


def _write(trace: ReplayTrace, path: Path, num_traces: int) -> None:
    from kvstore.lab.traces.kvt1 import write_kvt

    if num_traces > 1:
        raise ConfigError(f"--write-kvt {path} takes one trace; {num_traces} are given")
    write_kvt(trace, path)
    console(stderr=True).print(f"{path}: {len(trace.requests)} requests, {path.stat().st_size} bytes", markup=False)


def _check_policy(name: str) -> None:
    from kvstore.lab import compiled
    from kvstore.policies import find_policy

    try:
        if name not in compiled.policies():
            find_policy(name)
    except ConfigError as error:
        raise ConfigError(f"--policy {name}: {error}") from None


def _check_word(option: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ConfigError(f"{option} is {word!r}; it must be one of {', '.join(words)}")


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{text!r} names nothing; write a list such as 1%,5%")
    return words


def _share(text: str) -> float:
    """Read "25%" as 0.25."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--hints is {text!r}; write a share of the requests, 0% to 100%, or a list of them")
    return share


def _seconds(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise ConfigError(f"--ttl {text}: {error}") from None
    if not seconds > 0:
        raise ConfigError(f"--ttl is {text}; it must be positive, or left out for ever")
    return seconds


def _print(trace: ReplayTrace, cells: list[ReplayCell]) -> None:
    title = f"{trace.name}: {len(trace.requests)} requests, {trace.num_distinct} blocks of {trace.block_tokens} tokens"
    if trace.num_skipped:
        title += f"; {trace.num_skipped} broken lines left out"
    rows = table("policy", *NUMBERS, title=title, right=NUMBERS)
    num_slots = 0
    for cell in cells:
        if cell.capacity != num_slots:
            num_slots = cell.capacity
            best = round((1 - cell.min) * trace.prompt_tokens)
            _add(rows, cell, "optimum", cell.min, best, None if cell.lru_gap_closed is None else 1.0)
        times = (f"{cell.prefill_time_saved:.2%}", *(format_seconds(cell.ttft_s[name]) for name in ("p50", "p95")))
        name = f"{cell.policy}, {cell.hints:.0%} hints" if cell.hints else cell.policy
        _add(rows, cell, name, cell.token_hit_rate, cell.computed_tokens, cell.lru_gap_closed, times)
    console().print(rows)


def _add(
    rows: Table,
    cell: ReplayCell,
    name: str,
    rate: float,
    computed: int,
    closed: float | None,
    times: tuple[str, ...] = ("", "", ""),
) -> None:
    prompt_tokens = computed / (1 - rate) if rate < 1 else 0.0
    floor = (1 - cell.lru) * prompt_tokens
    numbers = [f"{cell.capacity:,}", f"{cell.share:.2%}", f"{rate:.2%}", f"{computed:,}"]
    numbers += [f"{computed / floor:.3f}x" if floor else "", "" if closed is None else f"{closed:.0%}"]
    add_row(rows, name, *numbers, *times)
