"""`kvstore replay TRACE...`: what a store of some size and policy would have hit of recorded traffic."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.replay_view import print_advice, print_cells, print_prices
from kvstore.console import console, print_json
from kvstore.errors import ConfigError
from kvstore.extras import require
from kvstore.units import format_bytes, format_seconds, parse_seconds

if TYPE_CHECKING:
    from kvstore.lab.cell import ReplayCell
    from kvstore.lab.timing import Costs
    from kvstore.lab.traces import ReplayTrace
    from kvstore.progress import ProgressBar

TIERS, COST, ANSWER = "Tiers and replicas", "Cost model", "Answers"
USUAL_HOST = "1%,5%,10%,25%"


def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="kvt1, Mooncake or Bailian; .gz, .zst too.")],
    host: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Host memory: 5% of the trace's blocks, 20000 blocks, 3Mtokens or 64GiB. A list (1%,5%), or a range "
            f"that doubles (1GiB..64GiB) or goes by steps (1%..25%+4%). {USUAL_HOST} unless given; any for --advise.",
            rich_help_panel=TIERS,
        ),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(metavar="SIZES", help="A disk tier, as --host; 0 is none: 0,25%,50%.", rich_help_panel=TIERS),
    ] = None,
    redis: Annotated[
        str | None, typer.Option(metavar="SIZES", help="A Redis tier, likewise.", rich_help_panel=TIERS)
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Of pages in Redis: exact, lossless; a list.", rich_help_panel=TIERS)
    ] = "exact",
    policy: Annotated[
        str, typer.Option(help="Policies beside LRU; a list, package.module:Class too.", rich_help_panel=TIERS)
    ] = "lru",
    ttl: Annotated[
        str | None, typer.Option(help="Time to live since the last use, such as 5min.", rich_help_panel=TIERS)
    ] = None,
    exclusive: Annotated[bool, typer.Option(help="A block is in one tier at a time.", rich_help_panel=TIERS)] = False,
    admit: Annotated[
        str, typer.Option(help="Of lower tiers: always, second_use, predicted.", rich_help_panel=TIERS)
    ] = "always",
    writes_per_day: Annotated[
        str | None, typer.Option(help="Most that is written to disk a day, as of --host.", rich_help_panel=TIERS)
    ] = None,
    hints: Annotated[
        str,
        typer.Option(
            metavar="SHARES",
            help="Of requests whose clients give hints (docs/hints.md), such as 0%,25%.",
            rich_help_panel=TIERS,
        ),
    ] = "0%",
    speculate: Annotated[
        str | None,
        typer.Option(
            metavar="WASTE",
            help="Also with pages of idle sessions brought ahead, at most so many bytes in vain for each used: 1, or a "
            "list; else as [speculation] has it (docs/configuration.md).",
            rich_help_panel=TIERS,
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Stores, each with such tiers.", rich_help_panel=TIERS)] = 1,
    routing: Annotated[
        str, typer.Option(help="Of requests to replicas: prefix, round_robin.", rich_help_panel=TIERS)
    ] = "prefix",
    pooled: Annotated[bool, typer.Option(help="The replicas share one store.", rich_help_panel=TIERS)] = False,
    model: Annotated[
        str, typer.Option(help="A preset, or a config.json; a wrong name shows the list.", rich_help_panel=COST)
    ] = "llama-3-8b",
    bytes_per_token: Annotated[
        int | None, typer.Option(min=1, help="Of KV, in place of the model's.", rich_help_panel=COST)
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100, l40s, h100, h200, b200.", rich_help_panel=COST)] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one replica.", rich_help_panel=COST)] = 1,
    media: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="As host=pcie5,disk=2nvme,redis=redis-100g; a wrong name shows the list. To measure this machine's: "
            "measured (memcpy), disk=DIRECTORY, redis=URL.",
            rich_help_panel=COST,
        ),
    ] = "",
    price: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Also print quality, TTFT, concurrency and cost. Dollars, as gpu=2.5,host=4,disk=0.1,redis=12 (a GPU "
            "by the hour, the tiers by GiB and month), or usual for those that are assumed.",
            rich_help_panel=COST,
        ),
    ] = None,
    advise: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Say what to buy: the least that reaches so much (95%) of what endless memory would.",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write a record for each row; - prints.", rich_help_panel=ANSWER),
    ] = None,
    details: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same with all figures.", rich_help_panel=ANSWER)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw hit rate over capacity, and TTFT (PNG).", rich_help_panel=ANSWER),
    ] = None,
    write_kvt: Annotated[
        Path | None,
        typer.Option(
            "--write-kvt", metavar="FILE", help="Only write the trace as kvt1 (.zst, .gz too).", rich_help_panel=ANSWER
        ),
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Of the traces, where the first line is not to say.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block, where it is not the usual.")] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Read the first ones only.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave broken lines out, and count them.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="For traces that hold prompts as text.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, planner (every policy) or compiled (fast).")] = "auto",
) -> None:
    """Replay traffic through the store's own planner and policies, under the trace's own clock.

    Beside each policy stand LRU, the policy to beat, and the offline optimum, which knows the future: how much of the
    way from one to the other a policy goes is what it is worth. Look at computed tokens, too: where nearly all is hit,
    a fall of 0.2 points is 5 % more to compute.

    \b
    Examples:
      kvstore replay t.jsonl --host 1%..25% --policy sieve --plot t.png
          hit rates at 1, 2, 4, 8, 16 and 25 % of the trace's different blocks
      kvstore replay t.jsonl --host 16GiB..256GiB --disk 0,1TiB --price usual
          five sizes, without a disk and with one, and what each costs
      kvstore replay t.jsonl --advise 95% --disk 0,50% --media disk=/mnt/nvme
          what to buy, with the disk of this machine
    """
    from kvstore.config.sections import SpeculationConfig
    from kvstore.lab import compiled
    from kvstore.lab.advice import advise as make_advice
    from kvstore.lab.advice import parse_share
    from kvstore.lab.capacity import parse_capacities, parse_capacity
    from kvstore.lab.hardware import CODECS
    from kvstore.lab.price import USUAL, Pricing, parse_prices
    from kvstore.lab.setup import ADMISSIONS, DISK, HOST, REDIS, ROUTINGS, Setup, Speculate
    from kvstore.lab.sweep import ENGINES, LRU, Player, num_plays, setups_of
    from kvstore.lab.traces import read_trace
    from kvstore.progress import ProgressBar

    ttl_s = None if ttl is None else _seconds(ttl)
    told = [_share(text) for text in _words("--hints", hints)]
    policies = list(dict.fromkeys([LRU, *_words("--policy", policy)]))
    for name in policies:
        _check_policy(name)
    for option, word, words in (
        ("--admit", admit, ADMISSIONS),
        ("--routing", routing, ROUTINGS),
        ("--engine", engine, ENGINES),
        *(("--codec", word, tuple(CODECS)) for word in _words("--codec", codec)),
    ):
        _check_word(option, word, words)
    if disk is None and redis is None and exclusive:
        raise ConfigError("--exclusive is about tiers below host memory; give --disk or --redis")
    if disk is None and writes_per_day is not None:
        raise ConfigError("--writes-per-day is about a disk tier; give --disk")
    wastes = [] if speculate is None else [_waste(text) for text in _words("--speculate", speculate)]
    if wastes and ((disk is None and redis is None) or replicas > 1):
        raise ConfigError(
            "--speculate brings pages from a tier below host memory, in one store; give --disk or --redis"
        )
    share = None if advise is None else parse_share(advise)
    prices = parse_prices(price or USUAL)
    _check_files(json_file, details, plot, write_kvt)
    if plot is not None:
        require("demo", "--plot")
    cells: list[ReplayCell] = []
    without: dict[str, tuple[float, ...]] = {}
    messages = console(stderr=True)
    if not compiled.is_built:
        messages.print("the compiled engine is not built here: the planner replays, about 10 us a block reference")
    with ProgressBar(messages) as bar:
        costs = _costs(model, bytes_per_token, gpu, gpus, media, bar)
        for path in traces:
            bar.update(f"reading {path}")
            trace = read_trace(
                path,
                format_name=format_name,
                block_tokens=block_size,
                max_requests=max_requests,
                skip_bad=skip_bad,
                tokenizer=tokenizer,
                on_progress=bar.update,
            )
            for note in trace.notes:
                messages.print(f"{path}: {note}", markup=False, soft_wrap=True)
            if write_kvt is not None:
                _write(trace, write_kvt, len(traces))
                continue
            token_bytes = costs.geometry.token_bytes
            sizes = (
                None if host is None and share is not None else parse_capacities(host or USUAL_HOST, trace, token_bytes)
            )
            lower = [
                [(name, size) for size in parse_capacities(room, trace, token_bytes, may_be_none=True)]
                for name, room in ((DISK, disk), (REDIS, redis))
                if room is not None
            ]
            base = Setup(
                ((HOST, 1),),
                ttl_s=ttl_s,
                is_exclusive=exclusive,
                admit=admit,
                writes_per_day=None if writes_per_day is None else parse_capacity(writes_per_day, trace, token_bytes),
                replicas=replicas,
                routing=routing,
                is_pooled=pooled,
            )
            hosts = [(HOST, size) for size in sizes or [1]] if share is None else [(HOST, 1)]
            ahead = SpeculationConfig()
            speed = ahead.bandwidth_bytes / (token_bytes * trace.block_tokens)
            how = [None, *(Speculate(waste, speed, ahead.max_slots_fraction) for waste in wastes)]
            setups = setups_of(base, [hosts, *lower], policies, _words("--codec", codec), told, how)
            player = Player(trace, costs, engine)
            total = None if share is not None else num_plays(setups) * player.num_references
            player.on_progress = partial(_tell, bar, trace.name, total)
            bare = player.nothing(replicas)
            span_s = float(player.at_s[-1] - player.at_s[0]) if len(player.at_s) else 0.0
            pricing = Pricing(prices, token_bytes * trace.block_tokens, gpus, span_s, trace.prompt_tokens)
            if share is not None:
                advice = make_advice(player, share, setups, sizes, pricing)
                chosen = [*advice.choices, *filter(None, (advice.less, advice.more)), *advice.out_of_reach]
                found = [choice.cell for choice in chosen]
                print_advice(player, advice, bare, pricing)
            else:
                found = [player.cell(setup) for setup in setups]
                if json_file != Path("-"):
                    print_cells(player, found, bare)
            if price is not None and json_file != Path("-"):
                print_prices(player, found, bare, pricing)
            cells += found
            without[trace.name] = bare.percentiles()
    _write_json(json_file, [cell.as_record() for cell in cells])
    _write_json(details, [cell.as_details() for cell in cells])
    if plot is not None:
        from kvstore.lab.sweep_plot import draw_sweep

        draw_sweep(cells, without, plot)
        messages.print(f"plot: {plot}", markup=False, soft_wrap=True)


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


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{option} {text!r} names nothing; write one, or a list such as a,b")
    return list(dict.fromkeys(words))


def _share(text: str) -> float:
    """Read "25%" as 0.25."""
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--hints is {text!r}; write a share of the requests, 0% to 100%, or a list of them")
    return share


def _waste(text: str) -> float:
    try:
        waste = float(text)
    except ValueError:
        waste = 0.0
    if not 0 < waste <= 100:
        raise ConfigError(f"--speculate is {text!r}; write bytes in vain for each used, more than 0 and at most 100")
    return waste


def _seconds(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise ConfigError(f"--ttl {text}: {error}") from None
    if not seconds > 0:
        raise ConfigError(f"--ttl is {text}; it must be positive, or left out for ever")
    return seconds


def _check_files(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: the directory {file.parent} is not there; make it first")


def _costs(model: str, bytes_per_token: int | None, gpu: str, gpus: int, media: str, bar: ProgressBar) -> Costs:
    from kvstore.lab.geometry import find_geometry
    from kvstore.lab.hardware import Medium, find_gpu, media_of
    from kvstore.lab.measure import measure
    from kvstore.lab.timing import Costs

    geometry, chip = find_geometry(model), find_gpu(gpu)
    if bytes_per_token is not None:
        geometry = replace(geometry, token_bytes=bytes_per_token, window_bytes=0)

    def measured(tier: str, place: str) -> Medium:
        bar.update(f"measuring {tier} {place}".rstrip())
        medium = measure(tier, place)
        latency = format_seconds(medium.latency_s)
        told = f"{tier}: {format_bytes(medium.bytes_per_s)}/s, {latency} a load, measured on this machine"
        console(stderr=True).print(told, markup=False, soft_wrap=True)
        return medium

    return Costs(geometry, chip, media_of(media, chip, measured), gpus)


def _tell(bar: ProgressBar, name: str, total: int | None, what: str, num_done: int) -> None:
    far = f", {num_done / total:.0%} of all" if total else ""
    bar.update(f"{name}: {what}{far}", num_done, total)


def _write_json(file: Path | None, records: list[dict[str, object]]) -> None:
    if file == Path("-"):
        print_json(records)
    elif file is not None:
        file.write_text(json.dumps(records, indent=2) + "\n")
