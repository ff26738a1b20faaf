"""The programs of engines on this machine: where they are found, and what to do where there is none."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from kvstore.errors import ConfigError, KVStoreError
from kvstore.extras import MissingExtra, how_to_install

LLAMA_SERVER = "llama-server"


def find_llama_server(given: str | None, has_arguments: bool = False) -> str | None:
    """The program to start; None for the server of the package `xllamacpp`. Raises KVStoreError with what to do.

    has_arguments: there are options that only a program takes.
    """
    if given is None:
        if not has_arguments and find_spec("xllamacpp") is not None:
            return None
        given = LLAMA_SERVER
        if shutil.which(given) is None:
            if has_arguments:
                raise ConfigError("OPTIONS after -- are for a llama-server program; give its path: --server PATH")
            raise MissingExtra(
                "there is neither a program llama-server nor the package xllamacpp; give the program's path (--server "
                f"PATH), or {how_to_install('llamacpp')}"
            )
    found = shutil.which(given)
    if found is None:
        raise KVStoreError(f"--server {given}: there is no such program; give the path of llama-server")
    return found


def find_vllm(given: str | None) -> str:
    """A program `vllm`, or the Python of an environment that has it. Raises KVStoreError with what to do.

    Without `given`: `vllm` on the path, else the environment that the engine tests have made ($VLLM_VENV, or the newest
    below ~/.cache/kvstore).
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise KVStoreError(f"--server {given}: there is no such program; give the path of vllm, or of its python")
        return os.path.abspath(found)
    found = shutil.which("vllm")
    if found is not None:
        return found
    kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvstore"
    made = sorted(kept.glob("vllm-venv-*/.locked-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    named = os.environ.get("VLLM_VENV")
    for folder in [Path(named)] if named else [path.parent for path in made]:
        python = folder / "bin" / "python"
        if python.exists():
            return str(python)
    raise KVStoreError(
        "there is no vllm on the path; install vLLM 0.32 or 0.33 in an environment of its own and name it (--server "
        "VENV/bin/python), or make the one of the tests in a clone: make test-vllm"
    )
