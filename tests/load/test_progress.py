from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from kvstore.load.progress import Progress
from kvstore.load.record import FAILED, Record
from kvstore.progress import PLAIN_EVERY_S


def test_line_has_hit_rate_ttft_refusals_and_errors_so_far(record: Callable[..., Record]) -> None:
    progress = Progress("run", 9, Console(file=io.StringIO()), lambda: 0.0)

    with progress:
        first = progress.line
        progress.add(record(prompt_tokens=300, cached_tokens=150, ttft_s=0.25, refusals=["queue_full"]))
        progress.add(record(status=FAILED))

    assert first == "run: 0/9 requests"
    assert progress.line == "run: 2/9 requests, hit rate 50.0%, TTFT p50 0.250 s, 1 refusals, 1 errors"


def test_lines_come_now_and_then_where_there_is_no_terminal(record: Callable[..., Record]) -> None:
    times = iter([0.0, 0.0, 1.0, PLAIN_EVERY_S, PLAIN_EVERY_S, PLAIN_EVERY_S + 1.0])
    output = io.StringIO()

    with Progress("run", 9, Console(file=output), lambda: next(times)) as progress:
        for number in range(3):
            progress.add(record(number))

    assert output.getvalue() == "run: 2/9 requests, TTFT p50 1.000 s\n"


def test_terminal_shows_the_line_and_is_left_clean(record: Callable[..., Record]) -> None:
    output = io.StringIO()

    with Progress("run", 9, Console(file=output, force_terminal=True), lambda: 0.0) as progress:
        progress.add(record())

    assert "/9 requests" in output.getvalue()
    assert output.getvalue().endswith("\x1b[2K"), "the line is erased"
