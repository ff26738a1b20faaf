"""A llama-server that we start: the one of the package `xllamacpp`, or a program of the user's."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import KVStoreError
from kvstore.llamacpp.folder import SlotsFolder

START_TIMEOUT_S = 600.0  # loading a large model from a cold disk
STOP_TIMEOUT_S = 10.0
STEP_S = 0.05
TAIL_BYTES = 1500
MAX_LOG_BYTES = 16 << 20  # in memory, as a rule
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach 127.0.0.1


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """The settings of a llama-server.

    model:      GGUF file.
    program:    path of a llama-server; None takes the one of `xllamacpp`.
    context:    tokens of one slot.
    cache_type: of K and V, as ggml calls it.
    arguments:  of the program, after ours.
    """

    model: Path
    program: str | None = None
    slots: int = 2
    context: int = 8192
    threads: int = 1
    cache_type: str = "f16"
    arguments: Sequence[str] = ()


class LlamaProcess:
    """One llama-server as a child on `port`, with a folder for slot files. Use as a context manager."""

    def __init__(self, settings: LlamaSettings, port: int) -> None:
        self.settings = settings
        self.port = port
        self._folder = SlotsFolder()
        self.folder = self._folder.path
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = self.folder / "llama-server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, and wait until it answers. Raises KVStoreError with the end of its log."""
        with self._log.open("ab") as output:  # appending, so that it may be cut
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + timeout_s
        while not self._is_up():
            if why := self.ended():
                raise KVStoreError(why)
            if time.monotonic() > until:
                raise KVStoreError(f"llama-server is not ready after {timeout_s:.0f} s; its log ends: {self._tail()}")
            time.sleep(STEP_S)

    def ended(self) -> str:
        """Why there is no server any more, with the end of its log; "" while there is one. Asked now and then."""
        if self._process is None or self._process.poll() is None:
            if self._log.exists() and self._log.stat().st_size > MAX_LOG_BYTES:
                os.truncate(self._log, 0)
            return ""
        return f"llama-server has ended with {self._process.returncode}; its log ends: {self._tail()}"

    def stop(self) -> None:
        """End it, and remove the folder. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None
        self._folder.remove()

    def __enter__(self) -> LlamaProcess:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _command(self) -> list[str]:
        mine = self.settings
        if mine.program is None:
            values: dict[str, object] = {
                "model": str(mine.model),
                "port": self.port,
                "slot_save_path": f"{self.folder}/",
                "n_ctx": mine.context * mine.slots,
                "n_parallel": mine.slots,
                "n_threads": mine.threads,
                "cache_type_k": mine.cache_type,
                "cache_type_v": mine.cache_type,
            }
            return _child(values)
        options: list[object] = ["--model", mine.model, "--host", "127.0.0.1", "--port", self.port]
        options += ["--slots", "--slot-save-path", self.folder, "--parallel", mine.slots]
        options += ["--ctx-size", mine.context * mine.slots, "--threads", mine.threads, "--cache-ram", 0]
        options += ["--cache-type-k", mine.cache_type, "--cache-type-v", mine.cache_type]
        return _child({"program": [mine.program, *map(str, options), *mine.arguments]})

    def _is_up(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=1.0) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _tail(self) -> str:
        try:
            return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip() or "it is empty"
        except OSError:
            return "it cannot be read"


def _child(settings: dict[str, object]) -> list[str]:
    return [sys.executable, "-m", "kvstore.llamacpp.child", json.dumps(settings)]
