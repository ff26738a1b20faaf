"""The picture of a run: time to first token by percentile, request by request, and where prompt tokens came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore import palette
from kvstore.load.compare import Comparison
from kvstore.load.player import PlayedWorkload
from kvstore.load.record import TIERS
from kvstore.load.summary import RequestGroup, Summary
from kvstore.palette import BAD, COMPUTED, GRID, INK, PAPER, SOFT, WITHOUT

# "cached": an engine that does not say from which tier; "not told": one that does not say at all.
COLORS = {"computed": COMPUTED, **palette.TIERS, "cached": palette.HOST, "not told": "#52606d"}
DPI = 150
WIDTH_IN, TOP_IN, PANEL_IN, GAP_IN, ROW_IN, FOOT_IN = 10.4, 1.45, 2.9, 0.95, 0.42, 0.4


def draw(
    runs: list[tuple[PlayedWorkload, Summary]], comparison: Comparison | None, title: str, subtitle: str, path: Path
) -> None:
    """Write a PNG of one run, or of one with the cache and one without. Needs matplotlib; opens no window."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = runs[0][1]
    rows = {**summary.by_replica} if len(summary.by_replica) > 1 else {}
    rows["all" if rows else next(iter(summary.by_replica), "all")] = summary.all
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        bars_in = ROW_IN * len(rows) + 0.2
        height = TOP_IN + PANEL_IN + GAP_IN + bars_in + FOOT_IN
        figure = Figure(figsize=(WIDTH_IN, height), facecolor=PAPER)
        FigureCanvasAgg(figure)
        upper = (FOOT_IN + bars_in + GAP_IN) / height
        _draw_percentiles(figure.add_axes((0.07, upper, 0.30, PANEL_IN / height)), runs)
        _draw_requests(figure.add_axes((0.46, upper, 0.51, PANEL_IN / height)), runs)
        _draw_sources(figure.add_axes((0.13, FOOT_IN / height, 0.84, bars_in / height)), rows)
        figure.text(0.02, 1 - 0.34 / height, title, fontsize=14, fontweight="bold", va="center")
        figure.text(0.02, 1 - 0.56 / height, subtitle, fontsize=9.5, color=SOFT, va="top", linespacing=1.5)
        if comparison is not None and comparison.differences:
            warning = f"{len(comparison.differences)} of {comparison.compared} answers are NOT the same text"
            figure.text(0.98, 1 - 0.34 / height, warning, fontsize=10, color=BAD, va="center", ha="right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _draw_percentiles(axes: Any, runs: list[tuple[PlayedWorkload, Summary]]) -> None:
    width = 0.8 / len(runs)
    tallest = max((s.ttft_s.p99 for _, s in runs if s.ttft_s), default=1.0)
    for place, (run, summary) in enumerate(reversed(runs)):
        values = summary.ttft_s
        if values is None:
            continue
        heights = (values.p50, values.p95, values.p99)
        at = [column + (place - (len(runs) - 1) / 2) * width for column in range(3)]
        first = summary is runs[0][1]
        axes.bar(at, heights, width * 0.92, color=COLORS["host"] if first else WITHOUT, label=run.name, zorder=3)
        for x, value in zip(at, heights, strict=True):
            axes.text(x, value + tallest * 0.015, f"{value:.2f}", ha="center", fontsize=8.5, color=INK)
    axes.set_xticks(range(3), ["p50", "p95", "p99"])
    axes.set_ylim(0, tallest * 1.25)
    if len(runs) > 1:
        axes.legend(facecolor=PAPER, edgecolor="none", framealpha=1, fontsize=8.5, loc="upper left", ncols=2)
    _dress(axes, "time to first token, seconds", grid="y")


def _draw_requests(axes: Any, runs: list[tuple[PlayedWorkload, Summary]]) -> None:
    for run, _ in runs[1:]:
        there = [(r.number, r.ttft_s) for r in run.records if r.ttft_s is not None]
        axes.scatter(*_columns(there), s=16, color=WITHOUT, label=run.name, zorder=2)
    run = runs[0][0]
    for source in COLORS:
        there = [(r.number, r.ttft_s) for r in run.records if r.ttft_s is not None and r.source == source]
        if there:
            axes.scatter(*_columns(there), s=16, color=COLORS[source], label=source, zorder=3)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("request", color=SOFT, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, handletextpad=0.1
        )
    _dress(axes, "request by request", grid="y")


def _draw_sources(axes: Any, rows: dict[str, RequestGroup]) -> None:
    for row, (_, group) in zip(range(len(rows) - 1, -1, -1), rows.items(), strict=True):
        left = 0.0
        total = max(1, group.prompt_tokens)
        if group.hit_rate is None:
            shares = {"not told": 1.0}
        else:
            tiers = [*(t for t in TIERS if t in group.hit_tokens), *(t for t in group.hit_tokens if t not in TIERS)]
            shares = {tier: group.hit_tokens[tier] / total for tier in tiers}
            shares["computed"] = 1 - sum(shares.values())
        for source, share in shares.items():
            axes.barh(row, share, left=left, height=0.62, color=COLORS.get(source, SOFT), zorder=3)
            if share > 0.06:
                axes.text(
                    left + share / 2,
                    row,
                    f"{source} {share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=PAPER,
                    zorder=4,
                )
            left += share
    axes.set_yticks(range(len(rows) - 1, -1, -1), list(rows))
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    _dress(axes, "where prompt tokens came from", grid="x")


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [number for number, _ in points], [value for _, value in points]


def _dress(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=SOFT)
    axes.grid(axis=grid, color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, length=0, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
