"""Tables and picture, from made-up records."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from kvstore.load.compare import Comparison, compare
from kvstore.load.player import PlayedWorkload
from kvstore.load.record import FAILED, SKIPPED, Record
from kvstore.load.summary import summarize
from kvstore.load.tables import comparison_report, report

Make = Callable[..., Record]


def shown(renderable: RenderableType) -> str:
    output = io.StringIO()
    Console(file=output, width=160).print(renderable)
    return output.getvalue()


def compared(cache: PlayedWorkload, baseline: PlayedWorkload) -> Comparison:
    return compare(cache, baseline, summarize(cache, False), summarize(baseline, False), same_server=True)


@pytest.fixture
def runs(record: Make) -> tuple[PlayedWorkload, PlayedWorkload]:
    """Six requests on two replicas, hits in all tiers; then the same without."""
    tiers = ["host", "host", "disk", "redis", "host", ""]
    cache = [
        record(
            n,
            ttft_s=0.1 + n / 10,
            replica=f"replica-{n % 2}",
            hit_tokens={name: 80 * (name == tier) for name in ("host", "disk", "redis")},
            cached_tokens=80 * bool(tier),
            stages={"queue_s": 0.01, "load_s": 0.02, "prefill_s": 0.03, "decode_s": 0.04},
        )
        for n, tier in enumerate(tiers)
    ]
    baseline = [record(n, ttft_s=2.0, replica="replica-0", hit_tokens={"host": 0}, cached_tokens=0) for n in range(6)]
    return PlayedWorkload("with the cache", cache, 3.0), PlayedWorkload("without the cache", baseline, 9.0)


def test_report_has_times_tiers_replicas_and_rates(runs: tuple[PlayedWorkload, PlayedWorkload]) -> None:
    text = shown(report(summarize(runs[0], False)))

    assert "6 of 6 requests answered in 3 s, 600 prompt tokens, 66.7% of them from the cache" in text
    for row in ("time to first token", "time per output token", "load from the cache", "on replica-1", "from redis"):
        assert row in text
    assert "240" in text


def test_no_digit_is_lost_in_a_narrow_terminal(runs: tuple[PlayedWorkload, PlayedWorkload]) -> None:
    output = io.StringIO()

    Console(file=output, width=80).print(report(summarize(runs[0], False)))

    assert "…" not in output.getvalue()
    assert max(len(line) for line in output.getvalue().splitlines()) <= 80


def test_trouble_is_told_with_an_example(record: Make) -> None:
    run = PlayedWorkload(
        "run",
        [
            record(0, status=FAILED, error="HTTP 500", error_detail="[bold]no[/bold]"),
            record(1, status=SKIPPED),
            record(2, refusals=["queue_full"]),
        ],
        1.0,
        interrupted=True,
    )

    text = shown(report(summarize(run, False)))

    assert "1 x HTTP 500, e.g. request 0: [bold]no[/bold]" in text, "what a server says is no markup"
    assert "1 requests continue one that was not answered" in text
    assert "refusals (429): 1 queue_full" in text
    assert "interrupted" in text


def test_nothing_answered_has_no_tables() -> None:
    text = shown(report(summarize(PlayedWorkload("run", [], 0.0), False)))

    assert text.splitlines() == [
        "run: 0 of 0 requests answered in 0 s, 0 prompt tokens, hits not told; 0 tokens out, 0.0/s"
    ]


def test_comparison_has_gains_and_the_verdict_on_the_texts(runs: tuple[PlayedWorkload, PlayedWorkload]) -> None:
    text = shown(comparison_report(compared(*runs)))

    assert "5.71x" in text
    assert "all 6 answers are the same text" in text


def test_different_texts_are_shown_beside_each_other(runs: tuple[PlayedWorkload, PlayedWorkload]) -> None:
    runs[0].records[3].text = "a b c X"
    text = shown(comparison_report(compared(*runs)))

    assert "1 of 6 answers are NOT the same text" in text
    assert "request 3 (replica-1) from character 6 on" in text
    assert "'a b c X'" in text
    assert "'a b c d'" in text


@pytest.mark.parametrize("both", [True, False])
def test_picture_is_drawn(runs: tuple[PlayedWorkload, PlayedWorkload], tmp_path: Path, both: bool) -> None:
    pytest.importorskip("matplotlib")
    from kvstore.load.plot import draw

    pairs = [(run, summarize(run, False)) for run in runs[: 2 if both else 1]]
    path = tmp_path / "made" / "run.png"

    draw(pairs, None, "a title", "a subtitle\nof two lines", path)

    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_picture_of_a_run_without_answers_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kvstore.load.plot import draw

    run = PlayedWorkload("run", [], 0.0)

    draw([(run, summarize(run, False))], None, "nothing", "", tmp_path / "run.png")

    assert (tmp_path / "run.png").exists()
