"""How far a run is: a bar, rewritten in place on a terminal; elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class ProgressBar:
    """One line of text, with a bar where it is known how much there is. Use as context manager; one thread.

    console: of standard error, so that results can be piped. now: a steady clock.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._shown_s = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        self._shown_s = self._now()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn(compact=True))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, line: str, done: float = 0.0, total: float | None = None) -> None:
        """Show the line. done, total: in any unit; None where nobody knows how much there will be."""
        if self._bar is not None:
            self._bar.update(self._task, description=line, completed=done, total=total)
        elif self._now() - self._shown_s >= PLAIN_EVERY_S:
            self._shown_s = self._now()
            self._console.print(line, markup=False, soft_wrap=True)
