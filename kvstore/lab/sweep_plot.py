"""A picture of a sweep: token hit rate over capacity, between LRU and the offline optimum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.lab.sweep import LRU, ReplayCell
from kvstore.palette import GRID, INK, PAPER, SOFT

LINES = ("#7a52a8", "#c0609c", "#56b4e9", "#b8420b", "#5c6b2f")  # of policies; tiers have colours of their own
DPI = 160
WIDTH_IN, HEIGHT_IN = 5.2, 4.0


def draw_rates(cells: Sequence[ReplayCell], path: Path) -> None:
    """Write a PNG with one panel for each trace. Needs matplotlib; opens no window."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(cell.trace for cell in cells))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        figure = Figure(figsize=(WIDTH_IN * len(traces), HEIGHT_IN), facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        for number, trace in enumerate(traces):
            axes = figure.add_subplot(1, len(traces), number + 1)
            _draw(axes, [cell for cell in cells if cell.trace == trace])
            axes.set_title(trace, fontsize=11.5, fontweight="bold", loc="left", color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _draw(axes: Any, cells: Sequence[ReplayCell]) -> None:
    floor = {cell.share: cell.lru for cell in cells}
    ceiling = {cell.share: cell.min for cell in cells}
    axes.fill_between(list(floor), _percent(floor), _percent(ceiling), color=GRID, alpha=0.6, zorder=1)
    axes.plot(list(ceiling), _percent(ceiling), "--", color=SOFT, label="optimum", zorder=3)
    others = [policy for policy in dict.fromkeys(cell.policy for cell in cells) if policy != LRU]
    for policy, color in zip(others, [LINES[i % len(LINES)] for i in range(len(others))], strict=True):
        rates = {cell.share: cell.token_hit_rate for cell in cells if cell.policy == policy}
        axes.plot(list(rates), _percent(rates), marker="o", markersize=4, color=color, label=policy, zorder=4)
    axes.plot(list(floor), _percent(floor), marker="o", markersize=4, color=INK, label=LRU, zorder=5)
    axes.set_xscale("log")
    axes.set_xticks(list(floor), [f"{share:.3g} %" for share in (100 * share for share in floor)])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("capacity, share of all different blocks", color=SOFT)
    axes.set_ylabel("prompt tokens that are hits, %", color=SOFT)
    axes.grid(color=GRID, zorder=0)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _percent(rates: dict[float, float]) -> list[float]:
    return [100 * rate for rate in rates.values()]
