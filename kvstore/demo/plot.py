"""The demo's figure: TTFT by stage, beside what the same prompt took without the store."""

from __future__ import annotations

from pathlib import Path

from kvstore.demo.report import BAR_TITLES, DemoReport, Turn
from kvstore.palette import COMPUTED, GRID, INK, PAPER, SOFT, TIERS, WITHOUT

COLORS = {**TIERS, "cold": COMPUTED, "conversation": "#7a52a8", "fork": "#c0609c"}
DPI = 160
WIDTH_IN = 9.6
ROW_IN = 0.74


def draw_bars(report: DemoReport, path: Path) -> None:
    """Write a PNG with one bar per stage. Needs matplotlib; opens no window."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10.5, "text.color": INK}):
        stages = report.stages
        height = 1.75 + ROW_IN * len(stages)
        figure = Figure(figsize=(WIDTH_IN, height), facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.165, 0.70 / height, 0.80, ROW_IN * len(stages) / height))
        longest = max(max(stage.last.cold_ttft_s, stage.last.answer.ttft_s) for stage in stages)
        rows = range(len(stages) - 1, -1, -1)
        for row, stage in zip(rows, stages, strict=True):
            turn = stage.last
            if stage.name != "cold":
                axes.barh(row, turn.cold_ttft_s, height=0.58, color=WITHOUT, zorder=2)
            axes.barh(row, turn.answer.ttft_s, height=0.58, color=COLORS[stage.name], zorder=3)
            axes.text(
                max(turn.answer.ttft_s, 0) + longest * 0.012,
                row,
                _label(turn, stage.name),
                va="center",
                fontsize=10,
                color=INK,
                zorder=4,
            )
        axes.set_yticks(list(rows), [BAR_TITLES[stage.name] for stage in stages])
        axes.set_xlim(0, longest * 1.30)
        axes.set_ylim(-0.55, len(stages) - 0.45)
        axes.set_xlabel("time to first token, seconds", color=SOFT, fontsize=9.5)
        axes.tick_params(axis="x", colors=SOFT, length=0, labelsize=9.5)
        axes.tick_params(axis="y", colors=INK, length=0)
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        prompt = stages[0].last.answer.prompt_tokens
        figure.text(0.02, 1 - 0.36 / height, _headline(report), fontsize=14.5, fontweight="bold", va="center")
        figure.text(
            0.02,
            1 - 0.68 / height,
            f"{report.model}, {report.dtype}, {report.threads} CPU threads, {prompt:,} prompt tokens. "
            "Grey: the same prompt without the store. One run.",
            fontsize=9.5,
            color=SOFT,
            va="center",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _headline(report: DemoReport) -> str:
    warm = [stage.last.speed_up for stage in report.stages if stage.name in TIERS]
    same = "the same tokens" if report.identical else "NOT the same tokens"
    if not warm:
        return f"Time to first token, {same}"
    low, high = min(warm), max(warm)
    span = f"{low:.0f}x" if round(low) == round(high) else f"{low:.0f} to {high:.0f}x"
    return f"A stored prefix answers {span} sooner, with {same}"


def _label(turn: Turn, name: str) -> str:
    seconds = f"{turn.answer.ttft_s:.2f} s"
    if name == "cold":
        return seconds
    share = turn.answer.reused_tokens / turn.answer.prompt_tokens
    return f"{seconds}   {turn.speed_up:.1f}x   {share:.0%} reused"
