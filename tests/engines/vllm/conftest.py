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

from tests.engines.vllm.answers import assert_same
from tests.engines.vllm.engine import BLOCK, DTYPE, ENVIRONMENT, STORE, Engine, EngineProcess, clean_up, make_prompt
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
    """vLLM without us: what every other engine must answer."""

    def __init__(self, model_of: Callable[[str], str]) -> None:
        self._model_of = model_of
        self._engines: dict[tuple[str, str], EngineProcess] = {}
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def check(
        self,
        answers: Sequence[dict[str, Any]],
        prompts: Sequence[Sequence[int]],
        *,
        cached: int | None = None,
        kind: str = "gqa",
        dtype: str = DTYPE,
    ) -> None:
        """Raise AssertionError unless each answer is vLLM's own at the same cut of its prompt.

        cached: tokens that did not have to be computed, where that is not what the answer says.
        """
        expected = [
            self.answer(prompt, answer["cached"] if cached is None else cached, len(answer["tokens"]), kind, dtype)
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        assert_same(answers, expected, dtype)

    def answer(
        self, prompt: Sequence[int], cached: int = 0, max_tokens: int = 8, kind: str = "gqa", dtype: str = DTYPE
    ) -> dict[str, Any]:
        """What vLLM answers alone if it takes `cached` tokens, whole blocks of them, from its own cache."""
        cached = min(cached, len(prompt) - 1) // BLOCK * BLOCK  # vLLM's own cache leaves the last block of a prompt
        key = (kind, dtype, cached, max_tokens, *prompt)
        if key not in self._known:
            engine = self._engine(kind, dtype)
            engine.forget_own_cache()
            if cached:
                # Another prompt of the same head. Its tail is short, or sliding layers forget what is before the cut.
                tail = make_prompt(min(len(prompt) - cached, BLOCK), 10_000 + cached)
                engine.ask([*prompt[:cached], *tail], 1)
            answer = engine.ask(prompt, max_tokens)
            assert answer["cached"] == cached
            self._known[key] = answer
        return self._known[key]

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _engine(self, kind: str, dtype: str) -> EngineProcess:
        if (kind, dtype) not in self._engines:
            self._engines[kind, dtype] = EngineProcess(self._model_of(kind), None, options={"dtype": dtype})
        return self._engines[kind, dtype]


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
            extra = {"host": {"capacity_bytes": 64 * MiB, "huge_pages": False}, "store": STORE, **extra}
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
