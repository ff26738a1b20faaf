"""A llama-server that we start: the one of the package `xllamacpp`, or a program of the user's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import KVStoreError

START_TIMEOUT_S = 600.0  # loading a large model from a cold disk
STOP_TIMEOUT_S = 10.0
STEP_S = 0.05
TAIL_BYTES = 1500
MEMORY_FOLDER = Path("/dev/shm")
ENOUGH_MEMORY_BYTES = 1 << 30  # in it, for slot files; else they go to the folder for temporary files


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
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-slots-", dir=slots_parent()))
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = self.folder / "llama-server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, and wait until it answers. Raises KVStoreError with the end of its log."""
        with self._log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    self._command(), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise KVStoreError(
                    f"{self.settings.program}: {error.strerror}; give the path of llama-server"
                ) from None
        until = time.monotonic() + timeout_s
        while not self._is_up():
            if why := self.ended():
                raise KVStoreError(why)
            if time.monotonic() > until:
                raise KVStoreError(f"llama-server is not ready after {timeout_s:.0f} s; its log ends: {self._tail()}")
            time.sleep(STEP_S)

    def ended(self) -> str:
        """Why there is no server any more, with the end of its log; "" while there is one."""
        if self._process is None or self._process.poll() is None:
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
        shutil.rmtree(self.folder, ignore_errors=True)

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
            values = {
                "model": str(mine.model),
                "port": self.port,
                "slot_save_path": f"{self.folder}/",
                "n_ctx": mine.context * mine.slots,
                "n_parallel": mine.slots,
                "n_threads": mine.threads,
                "cache_type_k": mine.cache_type,
                "cache_type_v": mine.cache_type,
            }
            return [sys.executable, "-m", "kvstore.cluster.llama_child", json.dumps(values)]
        options: list[object] = ["--model", mine.model, "--host", "127.0.0.1", "--port", self.port]
        options += ["--slots", "--slot-save-path", self.folder, "--parallel", mine.slots]
        options += ["--ctx-size", mine.context * mine.slots, "--threads", mine.threads, "--cache-ram", 0]
        options += ["--cache-type-k", mine.cache_type, "--cache-type-v", mine.cache_type]
        return [mine.program, *map(str, options), *mine.arguments]

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1.0) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _tail(self) -> str:
        try:
            return self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip() or "it is empty"
        except OSError:
            return "it cannot be read"


def slots_parent() -> Path:
    """Where slot files go: memory, if there is enough of it."""
    try:
        if shutil.disk_usage(MEMORY_FOLDER).free >= ENOUGH_MEMORY_BYTES:
            return MEMORY_FOLDER
    except OSError:
        pass
    return Path(tempfile.gettempdir())
