"""A llama-server that we start: the one of the package `xllamacpp`, or a program of the user's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.cluster.server_process import ServerProcess, as_child
from kvstore.llamacpp.folder import SlotsFolder


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


class LlamaProcess(ServerProcess):
    """One llama-server as a child on `port`, with a folder for slot files, which goes with it.

    log: for what it prints; a file in the folder if None.
    """

    def __init__(self, settings: LlamaSettings, port: int, log: Path | None = None) -> None:
        self._folder = SlotsFolder()
        self.folder = self._folder.path
        command = _command(settings, port, self.folder)
        log = log or self.folder / "llama-server.log"
        super().__init__("llama-server", command, f"http://127.0.0.1:{port}", log)

    def stop(self) -> None:
        """End it, and remove the folder. Idempotent."""
        super().stop()
        self._folder.remove()


def _command(mine: LlamaSettings, port: int, folder: Path) -> list[str]:
    if mine.program is None:
        values: dict[str, object] = {
            "model": str(mine.model),
            "port": port,
            "slot_save_path": f"{folder}/",
            "n_ctx": mine.context * mine.slots,
            "n_parallel": mine.slots,
            "n_threads": mine.threads,
            "cache_type_k": mine.cache_type,
            "cache_type_v": mine.cache_type,
        }
        return [sys.executable, "-m", "kvstore.llamacpp.child", json.dumps(values)]
    options: list[object] = ["--model", mine.model, "--host", "127.0.0.1", "--port", port]
    options += ["--slots", "--slot-save-path", folder, "--parallel", mine.slots]
    options += ["--ctx-size", mine.context * mine.slots, "--threads", mine.threads, "--cache-ram", 0]
    options += ["--cache-type-k", mine.cache_type, "--cache-type-v", mine.cache_type]
    return as_child([mine.program, *map(str, options), *mine.arguments])
