"""The parent's end of a replica: starts the process, speaks its JSON lines, and never waits without a deadline.

The hard thing: a child may die, hang or say nothing. Every answer is awaited with `select` on the pipe, up to a
deadline; what went wrong is told with the last lines of the child's standard error.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kvstore.demo.replica import Messages, ReplicaSpec
from kvstore.demo.report import StageAnswer
from kvstore.errors import KVStoreError

START_TIMEOUT_S = 300.0  # imports and loading; 10 s here, minutes for a large model on a cold disk
ANSWER_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 60.0
READ_BYTES = 1 << 16
ERROR_LINES = 4


class ReplicaFailed(KVStoreError):
    """A replica ended, hung or said that it could not do what it was asked."""


class ReplicaProcess:
    """One running replica, from the constructor (which waits until it is ready) to `close`. Not thread-safe."""

    def __init__(self, name: str, spec: ReplicaSpec, log_directory: Path, *, command: list[str] | None = None) -> None:
        """name: in messages and of the log file. command: another program with the same protocol, for tests."""
        self.name = name
        self._log_path = log_directory / f"{name}.log"
        self._buffer = b""
        command = command or [sys.executable, "-m", "kvstore.demo.replica"]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(spec),
            )
        try:
            self._send(spec.to_json())
            self._await_done(START_TIMEOUT_S, lambda _: None)
        except BaseException:
            self.kill()
            raise

    def ask(
        self,
        messages: Messages,
        *,
        max_new_tokens: int,
        use_store: bool = True,
        on_text: Callable[[str], None] = lambda _: None,
    ) -> StageAnswer:
        """Ask for the answer to a prompt; `on_text` sees the text as it comes."""
        record = self.call(
            {"do": "ask", "messages": list(messages), "max_new_tokens": max_new_tokens, "use_store": use_store},
            on_event=lambda event: on_text(str(event.get("text", ""))),
        )
        return StageAnswer.from_record(record)

    def flush(self) -> None:
        """Wait until what the replica saved is on every tier. Raises ReplicaFailed if that does not come about."""
        if not self.call({"do": "flush"})["flushed"]:
            raise ReplicaFailed(f"{self.name}: its pages were not written behind in time; see {self._log_path}")

    def call(
        self,
        command: Mapping[str, Any],
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Send one command and return its answer. Raises ReplicaFailed."""
        self._send(json.dumps(command))
        return self._await_done(timeout_s, on_event)

    def close(self) -> None:
        """Wait for its end; kill it if that takes too long. Idempotent."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()  # the end of its input is its sign to stop
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def __enter__(self) -> ReplicaProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        # After an error or Ctrl-C nobody wants to wait for a clean end.
        self.close() if kind is None else self.kill()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it has ended") from None

    def _await_done(self, timeout_s: float, on_event: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            record = json.loads(self._read_line(deadline))
            if record["event"] == "done":
                return dict(record)
            if record["event"] == "error":
                raise ReplicaFailed(f"{self.name}: {record['message']}")
            on_event(record)

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure("it did not answer in time")
            piece = os.read(descriptor, READ_BYTES)
            if not piece:
                raise self._failure("it ended unexpectedly")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, what: str) -> ReplicaFailed:
        lines = [line for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        said = "; its last words: " + " | ".join(lines[-ERROR_LINES:]) if lines else ""
        return ReplicaFailed(f"{self.name}: {what}{said}")


def _environment(spec: ReplicaSpec) -> dict[str, str]:
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(spec.threads)
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a replica that waits must not spin beside one that works
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path(spec.source).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"  # all that is needed lies there
    return environment
