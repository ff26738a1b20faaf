"""How a vLLM server with our connector is started: its command and its environment, from settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.cluster.server_process import as_child
from kvstore.config.sources import FILE_VARIABLE
from kvstore.errors import ConfigError

OF_THE_DAEMON = ("host", "disk", "redis", "breaker")  # sections that a node daemon has, where there is one
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")
# Without an accelerator: no minutes of compiling, threads that the others of a machine can live with, 1 GiB of KV.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
CPU_OPTIONS = ("--enforce-eager",)
PACKAGES = Path(__file__).parents[2]  # the folder of our packages
INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """The settings of a vLLM server.

    program:   `vllm`, or a Python that has it.
    dtype:     "" leaves it to vLLM; float32 where there is no accelerator, for many CPUs have no other arithmetic.
    threads:   that it computes with on CPU; 0 leaves it to vLLM.
    store:     FIELD -> value for the connector, as --set gives them.
    has_daemon: its pages are a node daemon's, wherever that is said.
    file:      TOML file of the store's settings; None is the usual one.
    arguments: of vLLM, after ours.
    """

    model: str
    program: str
    dtype: str = ""
    threads: int = 0
    max_running: int = 8
    store: Mapping[str, Any] | None = None
    has_daemon: bool = False
    file: Path | None = None
    arguments: Sequence[str] = ()


def command(mine: VllmSettings, port: int) -> list[str]:
    """The command, which ends with this process. Raises ConfigError for settings that the connector cannot have."""
    has_accelerator = any(os.path.exists(path) for path in ACCELERATORS)
    is_python = Path(mine.program).name.startswith("python")
    start = [mine.program, *(("-m", "vllm.entrypoints.openai.api_server") if is_python else ("serve",))]
    block_size, extra = connector_config(mine.store or {}, mine.has_daemon)
    dtype = mine.dtype or ("auto" if has_accelerator else "float32")
    served = Path(mine.model).name if Path(mine.model).is_dir() else mine.model
    options = ["--model", mine.model] if is_python else [mine.model]
    options += ["--served-model-name", served, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    options += ["--max-num-seqs", str(mine.max_running), "--enable-prompt-tokens-details"]
    options += ["--kv-transfer-config", json.dumps(transfer_config(extra))]
    options += ["--block-size", block_size] if block_size else []
    options += [] if has_accelerator else CPU_OPTIONS
    return as_child([*start, *options, *mine.arguments])


def environment(mine: VllmSettings) -> dict[str, str]:
    """Ours, with what vLLM needs to find the connector's packages; they must be installed there if they are here."""
    found = dict(os.environ)
    found.pop("PYTHONPATH", None)  # ours may hold another environment's packages
    # vLLM imports five thousand modules: 40 CPU seconds without bytecode, which an environment may keep in a folder.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    bytecode = Path(mine.program).parents[1] / "pycache"
    if bytecode.is_dir():
        found["PYTHONPYCACHEPREFIX"] = str(bytecode)
    if PACKAGES.name not in INSTALLED:
        found["PYTHONPATH"] = str(PACKAGES)
    if mine.file is not None:
        found[FILE_VARIABLE] = str(mine.file.absolute())
    if not any(os.path.exists(path) for path in ACCELERATORS):
        found = {**CPU_ENVIRONMENT, **found}
        if mine.threads:
            found["OMP_NUM_THREADS"] = str(mine.threads)
    return found


def transfer_config(extra: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `--kv-transfer-config`."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra),
    }


def connector_config(store: Mapping[str, Any], has_daemon: bool) -> tuple[str, dict[str, dict[str, Any]]]:
    """vLLM's own block size, "" for its default, and the connector's sections.

    With a node daemon the sections that are the daemon's stay away: a cluster gives one set of settings to all.
    """
    block_size, sections = "", dict[str, dict[str, Any]]()
    for name, value in store.items():
        section, _, field = name.partition(".")
        if not field:
            raise ConfigError(f"--set {name}: name a field of a section, such as host.capacity_bytes")
        if name == "store.block_size":
            block_size = str(value)
        elif not (has_daemon and section in OF_THE_DAEMON):
            sections.setdefault(section, {})[field] = value
    return block_size, sections
