"""A picture of a sweep: token hit rate over capacity, between LRU and the offline optimum, and the spread of TTFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from kvstore.lab.cell import ReplayCell
from kvstore.lab.sweep import LRU
from kvstore.palette import BAD, GRID, HOST, INK, PAPER, SOFT
from kvstore.units import format_seconds

LINES = ("#7a52a8", "#c0609c", "#56b4e9", "#b8420b", "#5c6b2f")  # of policies; tiers have colours of their own
DPI = 160
WIDTH_IN, HEIGHT_IN = 10.4, 4.0
MOST_SIZES = 5  # lines of TTFT: the smallest, the largest, and some between

Kind = tuple[tuple[tuple[str, int], ...], str]  # lower tiers and codec


def draw_sweep(cells: Sequence[ReplayCell], without: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write a PNG with two panels for each trace. Needs matplotlib; opens no window.

    without: the percentiles of TTFT where nothing is stored, by trace.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(cell.trace for cell in cells))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        size = (WIDTH_IN, HEIGHT_IN * max(1, len(traces)))
        figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subfigures(max(1, len(traces)), 1, squeeze=False)[:, 0]
        for row, trace in zip(rows, traces, strict=False):
            of_trace = sorted((cell for cell in cells if cell.trace == trace), key=lambda cell: cell.capacity)
            left, right = row.subplots(1, 2)
            _draw_rates(left, of_trace)
            _draw_ttft(right, of_trace, without.get(trace, ()))
            row.suptitle(f"{trace}, {of_trace[0].requests:,} requests", x=0.012, ha="left", fontsize=13, weight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _draw_rates(axes: Any, cells: Sequence[ReplayCell]) -> None:
    kinds = list(dict.fromkeys(_kind(cell) for cell in cells))
    floor = {cell.share: cell.lru for cell in cells if _kind(cell) == kinds[0]}
    ceiling = {cell.share: cell.min for cell in cells if _kind(cell) == kinds[0]}
    if len(kinds) == 1:
        axes.fill_between(list(floor), _percent(floor), _percent(ceiling), color=GRID, alpha=0.6, zorder=1)
        axes.plot(list(ceiling), _percent(ceiling), "--", color=SOFT, label="optimum", zorder=3)
        axes.plot(list(floor), _percent(floor), marker="o", markersize=4, color=INK, label=LRU, zorder=5)
    others = [(kind, policy) for kind in kinds for policy in dict.fromkeys(cell.policy for cell in cells)]
    others = [(kind, policy) for kind, policy in others if len(kinds) > 1 or policy != LRU]
    for number, (kind, policy) in enumerate(others):
        rates = {c.share: c.token_hit_rate for c in cells if _kind(c) == kind and c.policy == policy}
        label = ", ".join([policy, *(f"{name} {num_blocks:,}" for name, num_blocks in kind[0])])
        color = LINES[number % len(LINES)]
        axes.plot(list(rates), _percent(rates), marker="o", markersize=4, color=color, label=label, zorder=4)
    axes.set_xscale("log")
    shares = sorted({cell.share for cell in cells})
    axes.set_xticks(shares, [f"{share:.2g} %" for share in (100 * share for share in shares)], fontsize=8.5)
    axes.minorticks_off()
    axes.set_ylim(0, min(100, 10 * ceil(12 * max(cell.min for cell in cells))))
    axes.set_xlabel("host memory, share of all different blocks", color=SOFT)
    _dress(axes, "prompt tokens that are hits, %", "lower right")


def _draw_ttft(axes: Any, cells: Sequence[ReplayCell], without: Sequence[float]) -> None:
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    policy = next((name for name in policies if name != LRU), LRU)
    kind = _kind(cells[0])
    drawn = [cell for cell in cells if cell.policy == policy and _kind(cell) == kind and cell.ttft_s]
    if len(drawn) > MOST_SIZES:
        drawn = [drawn[round(i * (len(drawn) - 1) / (MOST_SIZES - 1))] for i in range(MOST_SIZES)]
    if without:
        axes.plot(without, range(101), "--", color=SOFT, label="no store", zorder=2)
    for number, cell in enumerate(drawn):
        alpha = 0.3 + 0.7 * (number + 1) / len(drawn)
        axes.plot(
            cell.ttft_s, range(101), color=HOST, alpha=alpha, label=f"{policy}, {100 * cell.share:.2g} %", zorder=3
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_formatter(lambda seconds, _: format_seconds(seconds))
    axes.minorticks_off()
    if any(cell.is_overloaded for cell in drawn):
        axes.set_xlabel("time to first token; the GPUs are overloaded: it is the queue's", color=BAD)
    else:
        axes.set_xlabel("time to first token, by the cost model", color=SOFT)
    _dress(axes, "requests that have their first token by then, %", "upper left")


def _kind(cell: ReplayCell) -> Kind:
    return cell.setup.tiers[1:], cell.setup.codec


def _dress(axes: Any, title: str, legend: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", color=SOFT)
    axes.grid(color=GRID, zorder=0)
    axes.tick_params(colors=SOFT, length=0)
    axes.legend(frameon=False, loc=legend, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _percent(rates: dict[float, float]) -> list[float]:
    return [100 * rate for rate in rates.values()]
