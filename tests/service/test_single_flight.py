"""Engines in processes of their own that are asked for one prompt at the same moment: it is computed once."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from connectors.transformers import KVCacheModel
from kvstore.testing.redis_server import LocalRedis
from tests.helpers.daemons import DaemonProcess
from tests.helpers.redis_server import NEEDS_REDIS
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK = 16
CHUNK = 32
PROMPT_TOKENS = 150  # four chunks that are saved, and a tail of 22 tokens
SAVED = PROMPT_TOKENS // CHUNK * CHUNK
SETTINGS = {"store.load_or_recompute": "false", "store.lookup_deadline_s": "10", "store.load_deadline_s": "30"}

# It says when it is about to compute a chunk of the prompt, and goes on when it is told to.
ENGINE = """
import json, sys
from connectors.transformers import KVCacheModel
from kvstore.config.sections import Config
from tests.helpers.tiny_models import random_ids, tiny_model

class Gate:
    def __init__(self, forward):
        self.forward = forward

    def __getattr__(self, name):
        return getattr(self.forward, name)

    def __call__(self, tokens, *args, **options):
        if len(tokens) > 1:
            print("chunk", flush=True)
            sys.stdin.readline()
        return self.forward(tokens, *args, **options)

with KVCacheModel.open(tiny_model("llama_gqa"), Config.load(), prefill_chunk=32) as kv:
    kv._forward = Gate(kv._forward)
    kv.connector.observe_prefill = lambda *_: None  # who computes a chunk in milliseconds is not waited for much longer
    print("ready", flush=True)
    sys.stdin.readline()
    answer = kv.generate(random_ids(150, seed=1), 8)
    report = answer.report
    told = {"tokens": answer.tokens, "sources": report.sources, "waited_s": report.compute_wait_s}
    print(json.dumps(told), flush=True)
    kv.flush(WAIT_S)
"""


class Engine:
    """A process that runs ENGINE."""

    def __init__(self, settings: dict[str, str]) -> None:
        variables = {f"KVSTORE_{name.upper().replace('.', '__')}": value for name, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE],
            env={"PATH": os.environ["PATH"], "KVSTORE_STORE__BLOCK_SIZE": str(BLOCK), **variables},
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Let it compute to the end; chunks computed, and its answer."""
        chunks = 0
        while (said := self.says()) == "chunk":
            chunks += 1
            self.go_on()
        told: dict[str, Any] = json.loads(said)
        return chunks, told

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def first_to_speak(engines: list[Engine]) -> Engine:
    with selectors.DefaultSelector() as selector:
        for engine in engines:
            assert engine.process.stdout is not None
            selector.register(engine.process.stdout, selectors.EVENT_READ, engine)
        ((key, _), *_) = selector.select(WAIT_S)
    speaker = key.data
    assert isinstance(speaker, Engine)
    return speaker


KINDS = ["one daemon", pytest.param("two machines on a Redis", marks=NEEDS_REDIS)]


@contextmanager
def two_engines(kind: str, directory: Path, lease_s: float) -> Iterator[list[Engine]]:
    """Engines that are ready, with a store in common."""
    settings = SETTINGS | {"store.compute_wait_s": str(lease_s)}
    with ExitStack() as stack:
        if kind == "one daemon":
            told = [f"{name}={value}" for name, value in settings.items()]
            daemon = DaemonProcess(directory / "kv.sock", None, *told, host_pages=512)
            stack.callback(daemon.kill)
            settings = {"service.url": f"unix://{daemon.socket}"}
        else:
            server = stack.enter_context(LocalRedis())
            settings |= {"redis.url": server.url, "host.capacity_bytes": "4MiB", "host.huge_pages": "false"}
        engines = []
        for _ in range(2):
            engines.append(Engine(settings | {"store.single_flight": "true"}))
            stack.callback(engines[-1].stop)
        assert [engine.says() for engine in engines] == ["ready", "ready"]
        yield engines


def expected_tokens() -> list[int]:
    cold = KVCacheModel(tiny_model("llama_gqa"), prefill_chunk=CHUNK)
    return cold.generate(random_ids(PROMPT_TOKENS, seed=1), 8).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_both_miss_at_the_same_moment_is_computed_once(kind: str, tmp_path: Path) -> None:
    with two_engines(kind, tmp_path, lease_s=60.0) as engines:
        for engine in engines:
            engine.go_on()

        one = first_to_speak(engines)
        other = engines[engines.index(one) - 1]
        one_chunks, one_told = one.answer()
        other_chunks, other_told = other.answer()

    assert (one_chunks, other_chunks) == (5, 1)
    assert one_told["sources"]["computed"] == PROMPT_TOKENS
    assert other_told["sources"]["computed"] == PROMPT_TOKENS - SAVED
    assert one_told["waited_s"] == 0.0 < other_told["waited_s"]
    assert one_told["tokens"] == other_told["tokens"] == expected_tokens()


# A daemon sees its client die; from another machine, only its claim is seen to end.
@pytest.mark.parametrize(
    ("kind", "lease_s", "bound_s"),
    [("one daemon", 60.0, 20.0), pytest.param("two machines on a Redis", 3.0, 20.0, marks=NEEDS_REDIS)],
)
def test_when_the_engine_that_computes_is_killed_the_other_one_goes_on(
    kind: str, lease_s: float, bound_s: float, tmp_path: Path
) -> None:
    with two_engines(kind, tmp_path, lease_s) as engines:
        for engine in engines:
            engine.go_on()

        one = first_to_speak(engines)
        other = engines[engines.index(one) - 1]
        one.process.send_signal(signal.SIGKILL)
        chunks, told = other.answer()

    assert chunks == 5
    assert told["sources"]["computed"] == PROMPT_TOKENS
    assert told["waited_s"] < bound_s
    assert told["tokens"] == expected_tokens()
