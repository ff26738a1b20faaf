"""How help is set."""

import pytest
from typer.testing import CliRunner

from kvstore.cli.app import app
from kvstore.cli.command import filled

COMMANDS = (
    "demo",
    "",
    "config",
    "doctor",
    "serve",
    "top",
    "bench",
    "replica",
    "router",
    "load",
    "cluster up",
    "inspect",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_has_no_type_and_nothing_is_cut(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})

    assert shown.exit_code == 0
    assert "<bool>" not in shown.stdout
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.stdout


def test_a_paragraph_is_one_line_and_examples_stay_as_they_are() -> None:
    assert filled("One\n  and two.\n\n\b\n  a\n  b\n") == "One and two.\n\n\b\n  a\n  b\n"
    assert filled(None) is None


def test_a_docstring_is_filled_to_the_terminals_width() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})

    lines = [line.strip() for line in shown.stdout.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("Engines attach"))
    last = next(number for number, line in enumerate(lines) if number > first and not line)
    for line, following in zip(lines[first:last], lines[first + 1 : last], strict=False):
        assert len(line) + 1 + len(following.split()[0]) > 78, f"{line!r} has room for more"
