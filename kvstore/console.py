"""How the commands print: one console for results, one for everything else.

Results go to standard output, progress and errors to standard error, so that `kvstore ... --json > file` holds
JSON only.
"""

from __future__ import annotations

import io
import json
import re
import sys
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_FILL = re.compile(r" +(?=\n)")
PIPE_COLUMNS = 140  # a pipe has no width; 80 would fold paths


def console(*, stderr: bool = False) -> Console:
    """A console on today's standard output or error."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        if "COLUMNS" not in made._environ:
            made.width = PIPE_COLUMNS
        made.file = cast(IO[str], _Trimmed(made.file))
    return made


class _Trimmed(io.TextIOBase):
    """A file without the spaces that fill a table's rows up to its width."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(_FILL.sub("", text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()


def print_json(value: Any) -> None:
    """Print JSON; what JSON has no form for is printed as its text."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_error(message: str) -> None:
    """Print one error in red, one line for each of its lines."""
    from rich.text import Text

    printer = console(stderr=True)
    for line in message.splitlines() or [""]:
        printer.print(Text(f"kvstore: {line}", style="bold red"), soft_wrap=True)


def add_row(rows: Table, *cells: str | Text, style: str | None = None) -> None:
    """Add a row whose cells are text as it is: a path with brackets in it is not markup."""
    from rich.text import Text

    rows.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table; `right` names the columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(title)
    made = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    return made
