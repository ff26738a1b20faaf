"""The report on the terminal: what was played, tables of what was seen, errors with an example each."""

from __future__ import annotations

from rich import box
from rich.console import Group as Rows
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.load.compare import NUM_EXAMPLES, Comparison
from kvstore.load.record import STAGES
from kvstore.load.summary import Spread, Summary
from kvstore.units import format_seconds

STAGE_TITLES = {
    "queue_s": "  queue",
    "load_s": "  load from the cache",
    "prefill_s": "  prefill",
    "decode_s": "  decode",
}


def report(summary: Summary, *, brief: bool = False) -> RenderableType:
    """One run; `brief` leaves the tables out."""
    tables = [] if brief or not summary.answered else [_spreads(summary), _groups(summary)]
    return Rows(_headline(summary), *tables, *_troubles(summary))


def comparison_report(comparison: Comparison) -> RenderableType:
    """Two runs beside each other."""
    table = _table("with and without the cache", "with", "without", "gain")
    for line in comparison.lines:
        gain = line.gain
        style = "" if gain is None else "green" if gain >= 1.1 else "red" if gain <= 0.9 else ""
        table.add_row(
            Text(line.name + (" per second" if line.unit == "/s" else "")),
            _measure(line.cache, line.unit),
            _measure(line.baseline, line.unit),
            Text("-" if gain is None else f"{gain:.2f}x", style=style),
        )
    parts: list[RenderableType] = [table, _identity(comparison)]
    for difference in comparison.differences[:NUM_EXAMPLES]:
        where = f" ({difference.replica})" if difference.replica else ""
        parts.append(
            Text(
                f"  request {difference.number}{where} from character {difference.at_character} on:\n"
                f"    with     {difference.cache!r}\n    without  {difference.baseline!r}"
            )
        )
    parts += [Text(f"note: {warning}", style="yellow") for warning in comparison.warnings]
    return Rows(*parts)


def _headline(summary: Summary) -> Text:
    whole = "" if not summary.interrupted else "  (interrupted: what there was until then)"
    hits = summary.all.hit_rate
    text = Text(f"{summary.name}: ", style="bold")
    text.append(
        f"{summary.answered:,} of {summary.requests:,} requests answered "
        f"in {format_seconds(round(summary.wall_s, 3))}, {summary.all.prompt_tokens:,} prompt tokens, "
        + ("hits not told" if hits is None else f"{hits:.1%} of them from the cache")
        + f"; {summary.completion_tokens:,} tokens out, {summary.output_tokens_per_s:,.1f}/s{whole}",
        style="not bold",
    )
    return text


def _spreads(summary: Summary) -> Table:
    table = _table("seconds", "mean", "p50", "p95", "p99", "max")
    waited = summary.held_s is not None and summary.held_s.max > 0.001
    rows: list[tuple[str, Spread | None]] = [
        ("time to first token", summary.ttft_s),
        ("  of it: waited for the turn before", summary.held_s if waited else None),
        ("  of it: sent late by this program", summary.late_s),
        ("  of it: after it was sent", summary.ttft_sent_s),
        ("time per output token", summary.token_s),
        ("end to end", summary.end_to_end_s),
        *((STAGE_TITLES[stage], summary.stages[stage]) for stage in STAGES),
    ]
    for name, values in rows:
        if values is not None:
            numbers = (values.mean, values.p50, values.p95, values.p99, values.max)
            table.add_row(Text(name), *(f"{number:.4f}" for number in numbers))
    return table


def _groups(summary: Summary) -> Table:
    tiers = tuple(f"hits\n{tier}" for tier in summary.all.hit_tokens)
    table = _table("requests", "", "prompt\ntokens", *tiers, "hit\nrate", "TTFT\np50", "\np95", "\np99")
    for kind, groups in (
        ("", {"all": summary.all}),
        ("on", summary.by_replica),
        ("from", summary.by_source),
        ("", summary.by_part),
    ):
        for name, group in groups.items():
            ttft = group.ttft_s
            table.add_row(
                Text(f"{kind} {name}".lstrip()),
                f"{group.requests:,}",
                f"{group.prompt_tokens:,}",
                *(f"{group.hit_tokens.get(tier, 0):,}" for tier in summary.all.hit_tokens),
                _share(group.hit_rate),
                *(["-"] * 3 if ttft is None else [f"{value:.3f}" for value in (ttft.p50, ttft.p95, ttft.p99)]),
            )
        table.add_section()
    return table


def _troubles(summary: Summary) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if summary.refusals:
        codes = ", ".join(f"{count:,} {code}" for code, count in summary.refusals.items())
        left = f"; {summary.refused:,} requests stayed refused" if summary.refused else "; asked again"
        lines.append(Text(f"refusals (429): {codes}{left}", style="yellow"))
    for kind, failure in summary.errors.items():
        lines.append(Text(f"errors: {failure.count:,} x {kind}, e.g. {failure.example}", style="bold red"))
    if summary.skipped:
        lines.append(
            Text(f"skipped: {summary.skipped:,} requests continue one that was not answered", style="bold red")
        )
    return lines


def _identity(comparison: Comparison) -> Text:
    if not comparison.compared:
        return Text("no request was answered in both runs: nothing to compare", style="bold red")
    if comparison.differences:
        return Text(
            f"{len(comparison.differences):,} of {comparison.compared:,} answers are NOT the same text with the cache "
            "as without",
            style="bold red",
        )
    return Text(f"all {comparison.compared:,} answers are the same text with the cache as without", style="green")


def _share(hit_rate: float | None) -> str:
    return "-" if hit_rate is None else f"{hit_rate:.1%}"


def _measure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.4f} s" if unit == "s" else f"{value:,.2f}"


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(Text(first), no_wrap=True)
    for number in numbers:
        # Folded rather than cut in a narrow terminal: a number with digits missing is worse than an ugly one.
        table.add_column(Text(number), justify="right", overflow="fold")
    return table
