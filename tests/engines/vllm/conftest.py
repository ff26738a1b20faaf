"""Real vLLM engines. They live in an environment of their own (`make test-vllm`); elsewhere nothing is collected.

An engine in this process takes 2-3 seconds once vLLM is imported, one in a new process half a minute, so tests share
them where they can. What vLLM answers without us comes from one engine per model in a process of its own.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engine import ENVIRONMENT, Engine, EngineProcess, clean_up
from tests.engines.vllm.models import make_model

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(ENVIRONMENT)
MiB = 1 << 20


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a tiny model of a kind."""
    root = Path(os.environ.get("TINY_MODELS") or tmp_path_factory.mktemp("models"))
    return lambda kind: str(make_model(root / f"{kind}-v3", kind))


class Reference:
    """vLLM without us: the tokens every other engine must give."""

    def __init__(self, model_of: Callable[[str], str]) -> None:
        self._model_of = model_of
        self._engines: dict[str, EngineProcess] = {}
        self._known: dict[tuple[Any, ...], list[int]] = {}

    def tokens(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, kind: str = "gqa") -> list[list[int]]:
        """Greedy tokens of each prompt, asked one at a time."""
        answers: list[list[int]] = []
        for prompt in prompts:
            key = (kind, max_tokens, *prompt)
            if key not in self._known:
                self._known[key] = self._engine(kind).ask(prompt, max_tokens)["tokens"]
            answers.append(self._known[key])
        return answers

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _engine(self, kind: str) -> EngineProcess:
        if kind not in self._engines:
            self._engines[kind] = EngineProcess(self._model_of(kind), None)
        return self._engines[kind]


@pytest.fixture(scope="session")
def reference(model_of: Callable[[str], str]) -> Iterator[Reference]:
    reference = Reference(model_of)
    yield reference
    reference.close()


@pytest.fixture(scope="module")
def open_engine(model_of: Callable[[str], str]) -> Iterator[Callable[..., Engine]]:
    """Make an engine in this process; one lives at a time, the one before is closed. Without `extra`, vLLM alone."""
    current: list[Engine] = []

    def make(extra: dict[str, Any] | None, *, kind: str = "gqa", model: str = "", **values: Any) -> Engine:
        while current:
            current.pop().close()
        if extra is not None and "service" not in extra:  # else the daemon has the host memory
            extra = {"host": {"capacity_bytes": 64 * MiB, "huge_pages": False}, **extra}
        try:
            engine = Engine(model or model_of(kind), extra, **values)
        except BaseException:
            clean_up()
            raise
        current.append(engine)
        return engine

    yield make
    while current:
        current.pop().close()


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(point)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this system does not let us mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def fill(ballast: Path) -> None:
    """Take all the space there is."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
