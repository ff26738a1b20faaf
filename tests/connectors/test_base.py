"""The small arithmetic that all connectors share."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import connectors.base
from connectors.base import resume_blocks, tokens_by_tier

ROOT = Path(__file__).parents[2]


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(connectors.base).failed == 0


@pytest.mark.parametrize(
    ("num_blocks", "num_tokens", "step", "expected"),
    [
        (0, 100, 1, 0),
        (6, 96, 1, 5),  # the last token of the prompt is left to compute
        (6, 97, 1, 6),
        (9, 97, 1, 6),  # a match is never longer than the prompt
        (6, 97, 4, 4),
        (3, 97, 4, 0),
        (8, 128, 4, 4),
        (8, 129, 4, 8),
        (1, 1, 1, 0),
        (1, 0, 1, 0),
    ],
)
def test_a_match_is_cut_to_where_the_engine_can_resume(
    num_blocks: int, num_tokens: int, step: int, expected: int
) -> None:
    assert resume_blocks(num_blocks, num_tokens, 16, step) == expected


@pytest.mark.parametrize(
    ("granted", "arrived", "expected"),
    [
        ({"host": 2, "disk": 3}, 5, {"host": 32, "disk": 48}),
        ({"host": 2, "disk": 3}, 4, {"host": 32, "disk": 32}),  # what is missing was to come from below
        ({"host": 2, "disk": 3}, 1, {"host": 16}),
        ({"host": 2}, 0, {}),
        ({}, 0, {}),
    ],
)
def test_tokens_by_tier_add_up_to_what_arrived(granted: dict[str, int], arrived: int, expected: dict[str, int]) -> None:
    assert tokens_by_tier(granted, arrived, 16) == expected


def test_importing_the_connector_imports_no_engine() -> None:
    code = "import sys, connectors.transformers; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert printed.stdout.strip() == "[]"
