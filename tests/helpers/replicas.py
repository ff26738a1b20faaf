"""Replicas and routers for tests: real processes on a tiny random model, and a client that hides nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from tests.helpers.waiting import WAIT_S, wait_until

CHUNK = 64
BLOCK = 16
POSITIONS = 4096
REPLICA_OPTIONS = (
    "--prefill-chunk",
    str(CHUNK),
    "--set",
    f"store.block_size={BLOCK}",
    "--set",
    "host.capacity_bytes=32MiB",
    "--set",
    "host.huge_pages=false",
)


def make_model(directory: Path) -> Path:
    """A random Llama with two layers and a tokenizer of bytes, whose greedy text is not one letter again and again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvstore.demo.random_model import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class Server:
    """`kvstore replica` or `kvstore router` in a process of its own, on a port it took itself."""

    def __init__(self, directory: Path, command: str, *options: str) -> None:
        self.log = directory / f"{command}-{time.monotonic_ns()}.log"
        arguments = [sys.executable, "-m", "kvstore", command, "--port", "0", "--verbose", *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "500"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.url = ""

    def wait_listening(self) -> None:
        """Wait until it has told its address."""

        def told() -> bool:
            found = re.search(r"on (http://[\d.]+:\d+): ", self.text)
            self.url = found[1] if found else ""
            return bool(found)

        self._wait(told)

    def wait_ready(self) -> None:
        """Wait until `/readyz` says so."""
        self.wait_listening()
        self._wait(lambda: self.get("/readyz").status == 200)

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Answer:
        """A GET."""
        return call(self.url, "GET", path)

    def post(self, path: str, **body: Any) -> Answer:
        """A POST of JSON."""
        return call(self.url, "POST", path, body)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)

    def _wait(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.text}"
            return condition()

        wait_until(holds, lambda: self.text)


@dataclass
class Answer:
    """What came back: JSON, or the events of a stream with the time of each."""

    status: int
    headers: dict[str, str]
    raw: bytes
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def body(self) -> Any:
        """The JSON."""
        return json.loads(self.raw)

    @property
    def replica(self) -> str:
        """Who answered."""
        return self.headers["X-KVStore-Replica"]

    @property
    def text(self) -> str:
        """The generated text, streamed or not."""
        return "".join(text_of(body) for body in (self.events or [self.body]))

    @property
    def last(self) -> Any:
        """The JSON with usage: the answer, or the last event of the stream."""
        return self.events[-1] if self.events else self.body

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that were loaded."""
        return sum(self.last["kvstore"]["hit_tokens"].values())

    @property
    def error(self) -> Any:
        """The error."""
        return self.body["error"]


class Stream:
    """A streamed answer, read event by event; `close` hangs up."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        self.began = time.monotonic()
        self._connection = _connection(url)
        self._connection.request("POST", path, json.dumps({**body, "stream": True}))
        self._answer: HTTPResponse | None = None
        self.is_done = False
        self.got = Answer(0, {}, b"")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events, until `[DONE]` or the end of the connection."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
            self.got = Answer(self._answer.status, dict(self._answer.headers), b"")
        while line := self._answer.readline():
            if line == b"data: [DONE]\n":
                self.is_done = True
            elif line.startswith(b"data: "):
                self.got.seconds.append(time.monotonic() - self.began)
                self.got.events.append(json.loads(line[6:]))
                yield self.got.events[-1]

    def read(self, num_events: int) -> None:
        """Read so many events, and no further."""
        for _, _ in zip(range(num_events), self, strict=False):
            pass

    def finish(self) -> Answer:
        """Read the rest."""
        for _ in self:
            pass
        self.close()
        return self.got

    def close(self) -> None:
        """Hang up."""
        if self._answer is not None:
            self._answer.close()
        self._connection.close()


def call(url: str, method: str, path: str, body: Any = None) -> Answer:
    """One request. body: bytes as they are, else as JSON."""
    connection = _connection(url)
    try:
        connection.request(method, path, body if isinstance(body, bytes) or body is None else json.dumps(body))
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.headers), answer.read())
    finally:
        connection.close()


def text_of(body: dict[str, Any]) -> str:
    """The text of an answer or a chunk."""
    for choice in body.get("choices", []):  # none in an error
        part = choice.get("message") or choice.get("delta")
        text: str = choice["text"] if part is None else part["content"]
        return text
    return ""


def end_all(servers: Sequence[Server]) -> None:
    """Leave nothing running."""
    for server in servers:
        if server.process.poll() is None:
            server.signal(signal.SIGCONT)
            server.kill()


def _connection(url: str) -> HTTPConnection:
    return HTTPConnection(url.removeprefix("http://"), timeout=WAIT_S)
