"""Every row of the acceptance table in docs/sglang.md names a test that exists, and every case has a row."""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EVENTS = (
    "restart",
    "cancel",
    "clear",
    "concurrent restores",
    "eviction",
    "failed load",
    "slow load",
    "partial hit",
    "detach",
)
ROW = re.compile(r"^\| ([a-z ]+) \| (\d) \| (idle|loaded) \| (.+) \| `(\w+)\[(\S+)\]` \|$")


def rows() -> list[tuple[str, ...]]:
    lines = (ROOT / "docs" / "sglang.md").read_text().splitlines()
    return [found.groups() for line in lines if (found := ROW.match(line))]


def known_tests() -> dict[str, list[str]]:
    """Tests by name, with the fixtures that they ask for."""
    source = (ROOT / "tests/engines/sglang/linker/test_acceptance.py").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: [arg.arg for arg in node.args.args] for node in functions if node.name.startswith("test_")}


def test_there_is_a_row_for_each_case() -> None:
    cases = [(event, int(ranks), load) for event, ranks, load, *_ in rows()]

    assert cases == list(product(EVENTS, (1, 2), ("idle", "loaded")))
    assert len(cases) == 36


def test_each_row_names_a_test_that_exists() -> None:
    known = known_tests()
    for event, ranks, load, _, name, case in rows():
        assert "on_all_ranks" in known.get(name, []), f"{event}: {name}"  # which runs it in each case
        assert case == f"tp{ranks}-{load}"


def test_each_test_of_the_table_is_in_it() -> None:
    assert set(known_tests()) == {name for *_, name, _ in rows()}
