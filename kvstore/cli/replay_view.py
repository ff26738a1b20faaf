"""What `kvstore replay` prints: the table of a sweep, the table of prices, and advice in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.console import add_row, console, table
from kvstore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.text import Text

    from kvstore.lab.advice import Choice, SizingAdvice
    from kvstore.lab.cell import ReplayCell
    from kvstore.lab.price import Pricing
    from kvstore.lab.setup import Setup
    from kvstore.lab.sweep import Player
    from kvstore.lab.timing import ReplayTiming

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
SPECULATED = ("to host", "waste")
SPECULATED_MEANS = (
    "ahead N: pages of idle sessions are brought, N bytes in vain for each used at most; to host: of the hits of lower "
    "tiers, those that became hits of host memory; waste: bytes in vain for each used"
)
PRICED = ("hit rate", "TTFT p50", "p95", "requests/s", "sessions", "$ a month", "$ a million")


def print_cells(player: Player, cells: Sequence[ReplayCell], bare: ReplayTiming) -> None:
    """Print a row for each cell, with floor and ceiling. bare: of the trace where nothing is stored."""
    trace = player.trace
    title = f"{trace.name}: {len(trace.requests)} requests, {player.num_distinct} blocks of {trace.block_tokens} tokens"
    if trace.num_skipped:
        title += f"; {trace.num_skipped} broken lines left out"
    has_lower = any(len(cell.setup.tiers) > 1 for cell in cells)
    numbers = (*NUMBERS, *(SPECULATED if any(cell.speculation for cell in cells) else ()))
    rows = table("policy", *(("below",) if has_lower else ()), *numbers, title=title, right=numbers)

    def add(name: str, setup: Setup | None, *numbers: str | Text) -> None:
        add_row(rows, name, *((_below(setup) if setup else "",) if has_lower else ()), *numbers)

    prompt_tokens = trace.prompt_tokens
    add("no store", None, "0", "", "", f"{prompt_tokens:,}", "", "", "", *_ttft(bare.percentiles(), bare.busy))
    shown: tuple[tuple[str, int], ...] = ()
    for cell in cells:
        size = (f"{cell.capacity:,}", f"{cell.share:.2%}")
        floor = (1 - cell.lru) * prompt_tokens
        if cell.setup.tiers != shown:
            shown = cell.setup.tiers
            best = round((1 - cell.min) * prompt_tokens)
            closed = "" if cell.lru_gap_closed is None else "100%"
            add("optimum", cell.setup, *size, f"{cell.min:.2%}", f"{best:,}", _times(best, floor), closed, "", "", "")
        add(
            _name(cell.setup),
            cell.setup,
            *size,
            f"{cell.token_hit_rate:.2%}",
            f"{cell.computed_tokens:,}",
            _times(cell.computed_tokens, floor),
            "" if cell.lru_gap_closed is None else f"{cell.lru_gap_closed:.0%}",
            f"{cell.prefill_time_saved:.2%}",
            *_ttft(cell.ttft_s, cell.busy),
            *_speculated(cell),
        )
    output = console()
    output.print(rows)
    if any(cell.speculation for cell in cells):
        output.print(SPECULATED_MEANS, markup=False, soft_wrap=True, style="dim")
    _print_overload(cells)


def print_prices(player: Player, cells: Sequence[ReplayCell], bare: ReplayTiming, pricing: Pricing) -> None:
    """Print for each cell its quality, TTFT, concurrency and price, in one table."""
    from kvstore.lab.hardware import CODECS

    title = f"{player.trace.name}, $: {pricing.prices}"
    rows = table("policy", "room", "quality", *PRICED, title=title, right=PRICED)
    rate = len(player.trace.requests) / pricing.span_s if pricing.span_s else 0.0
    cost = f"{pricing.without(bare.spent_s):.3f}"
    times = _ttft(bare.percentiles(), bare.busy)
    add_row(rows, "no store", "", "exact", "0%", *times, _most(rate, bare.busy), "0", "0", cost)
    for cell in cells:
        bill = pricing.bill(cell)
        add_row(
            rows,
            _name(cell.setup),
            _room(cell.setup, pricing),
            CODECS[cell.setup.codec].quality,
            f"{cell.token_hit_rate:.1%}",
            *_ttft(cell.ttft_s, cell.busy),
            _most(rate, cell.busy),
            f"{sessions_held(player, cell.setup):,}",
            f"{bill.month:,.0f}",
            f"{bill.million:.3f}",
        )
    console().print(rows)


def print_advice(player: Player, advice: SizingAdvice, bare: ReplayTiming, pricing: Pricing) -> None:
    """Print advice in plain words."""
    say, trace, share = console().print, player.trace, f"{100 * advice.share:.4g} %"
    total = format_bytes(player.num_distinct * pricing.block_bytes)

    def line(text: str, indent: int = 0) -> None:
        say(" " * indent + text, markup=False, soft_wrap=True)

    line(
        f"{trace.name}: {len(trace.requests):,} requests in {format_seconds(pricing.span_s)}, "
        f"{trace.prompt_tokens:,} prompt tokens, about {player.num_sessions:,} sessions."
    )
    line(
        f"Endless memory would hit {advice.rate:.1%} of the tokens and save {advice.saved:.1%} of the prefill time; "
        f"all blocks are {total}."
    )
    for short in advice.out_of_reach:
        most = f"{100 * short.reached:.1f} %"
        line(
            f"{share} of that is not reached by {_room(short.cell.setup, pricing)} ({_name(short.cell.setup)}): {most}."
        )
    if not advice.choices:
        return
    best, *others = advice.choices
    line(f"For {share} of that: {_room(best.cell.setup, pricing)}, policy {_name(best.cell.setup)}.")
    for name, told in _facts(player, best, bare, pricing):
        line(f"{name:<8}{told}", 2)
    if best.bill.million > pricing.without(bare.spent_s):
        line("At these prices the room costs more than the GPU time that it saves; it buys TTFT and requests a second.")
    for name, step in (("One step down", advice.less), ("One step up", advice.more)):
        if step is not None:
            line(f"{name}, {_room(step.cell.setup, pricing)}: {_change(best, step)}.")
    for other in others:
        line(f"Instead, {_room(other.cell.setup, pricing)} ({_name(other.cell.setup)}): {_change(best, other)}.")
    _print_overload([best.cell])


def sessions_held(player: Player, setup: Setup) -> int:
    """Return about how many sessions a setup has room for: as many as it holds blocks, with what they share."""
    share = min(1.0, setup.room / (player.num_distinct or 1))
    return int(share * player.num_sessions)


def minutes_held(cell: ReplayCell, name: str, span_s: float) -> float | None:
    """Return how many minutes a block stays in a tier on average; None where none ever has to leave.

    By Little's law: what is held is what comes in a minute, times the minutes that it stays.
    """
    written, held = cell.written[name], cell.setup.replicas * dict(cell.setup.tiers)[name]
    return held / written * span_s / 60 if written > held else None


def _facts(player: Player, best: Choice, bare: ReplayTiming, pricing: Pricing) -> list[tuple[str, str]]:
    cell, span_s = best.cell, pricing.span_s
    held = []
    for name in cell.setup.names:
        minutes = minutes_held(cell, name, span_s)
        told = "everything" if minutes is None else f"{format_seconds(60 * minutes)} of traffic"
        held.append(f"{name} {told}" if len(cell.setup.names) > 1 else told)
    days = span_s / 86_400
    written = [
        f"{format_bytes(num_blocks * pricing.block_bytes / days)} to {name}"
        for name, num_blocks in cell.written.items()
        if days
    ]
    p50, p95 = _ttft(cell.ttft_s, cell.busy)
    was50, was95 = _ttft(bare.percentiles(), bare.busy)
    return [
        ("holds", f"{', '.join(held)}, about {sessions_held(player, cell.setup):,} sessions"),
        ("hits", f"{cell.token_hit_rate:.1%} of the tokens; computed are {cell.computed_tokens:,}"),
        ("saves", f"{cell.prefill_time_saved:.1%} of the prefill time"),
        ("TTFT", f"p50 {p50}, p95 {p95}; without a store {was50} and {was95}"),
        ("writes", f"a day, {', '.join(written)}"),
        (
            "costs",
            f"${best.bill.month:,.0f} a month for the room; ${best.bill.million:.3f} for a million prompt tokens, "
            f"without a store ${pricing.without(bare.spent_s):.3f}",
        ),
        ("prices", f"$, {pricing.prices}"),
    ]


def _change(best: Choice, other: Choice) -> str:
    computed = other.cell.computed_tokens / best.cell.computed_tokens if best.cell.computed_tokens else 1.0
    p50, p95 = _ttft(other.cell.ttft_s, other.cell.busy)
    return (
        f"{100 * other.reached:.1f} % of what can be had, {computed:.2f}x the computed tokens, TTFT p50 {p50}, "
        f"p95 {p95}, ${other.bill.month:,.0f} a month, ${other.bill.million:.3f} a million"
    )


def _ttft(percentiles: Sequence[float], busy: float) -> tuple[str, str]:
    if not percentiles:
        return "", ""
    mark = "!" if busy > 1 else ""
    return mark + format_seconds(percentiles[50]), mark + format_seconds(percentiles[95])


def _print_overload(cells: Sequence[ReplayCell]) -> None:
    worst = max(cells, key=lambda cell: cell.busy, default=None)
    if worst is None or not worst.is_overloaded:
        return
    needed = math.ceil(worst.setup.replicas * worst.busy)
    console().print(
        f"! The modelled GPUs get up to {worst.busy:.2f} times the work that they can do: such a TTFT is that of the "
        f"queue, and grows with the length of the trace. Compare time saved, or give --replicas {needed} or more.",
        markup=False,
        soft_wrap=True,
        style="yellow",
    )


def _times(computed: float, floor: float) -> str:
    return f"{computed / floor:.3f}x" if floor else ""


def _most(rate: float, busy: float) -> str:
    return f"{rate / busy:.2f}" if busy else ""


def _speculated(cell: ReplayCell) -> tuple[str, ...]:
    gain = cell.speculation
    if gain is None:
        return ()
    turned = "" if gain.turned is None else f"{gain.turned:.2%}"
    if gain.wasted_per_used is None:
        return turned, "all in vain" if gain.wasted else "nothing brought"
    return turned, f"{gain.wasted_per_used:.2f}{f', {gain.stops} stops' if gain.stops else ''}"


def _name(setup: Setup) -> str:
    hints = f", {setup.hints:.0%} hints" if setup.hints else ""
    return setup.policy + hints + (f", ahead {setup.speculate.max_waste:g}" if setup.speculate else "")


def _below(setup: Setup) -> str:
    codec = f" ({setup.codec})" if setup.codec != "exact" else ""
    return ", ".join(f"{name} {num_blocks:,}{codec if name == 'redis' else ''}" for name, num_blocks in setup.tiers[1:])


def _room(setup: Setup, pricing: Pricing) -> str:
    codec = f" ({setup.codec})" if setup.codec != "exact" else ""
    sizes = pricing.tier_bytes(setup)
    parts = [f"{name} {format_bytes(size)}{codec if name == 'redis' else ''}" for name, size in sizes.items()]
    return ", ".join(parts) + (f" in {setup.replicas} replicas" if setup.replicas > 1 else "")
