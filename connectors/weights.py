"""The identity of weights by their files: what a name or a path does not say.

Sampled, it reads every file's size, its head (for safetensors and GGUF: names, shapes and types of tensors) and SAMPLES
pieces spread over it, some milliseconds for a model of any size; training changes all weights, so a changed model
changes the samples. In full it reads every byte.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
HEAD_BYTES = 1 << 20
SAMPLES = 256  # per file
SAMPLE_BYTES = 4096


def files_digest(folder: Path, *, full: bool = False) -> str:
    """32 hex digits over all weight files below `folder` (or of the file itself), the same on every machine."""
    files = [folder] if folder.is_file() else _weight_files(folder)
    if not files:
        raise ConfigError(f"{folder} has no weight files ({', '.join(WEIGHT_FILES)}); name the weights yourself")
    digest = hashlib.sha256()
    for path in files:
        # Consolidated and sharded copies of one model have other names: then it is another model to us, a miss.
        digest.update(f"{path.name}|{path.stat().st_size}|".encode())
        _read(path, digest, full)
    return digest.hexdigest()[:32]


def _weight_files(folder: Path) -> list[Path]:
    for pattern in WEIGHT_FILES:  # the first kind that is there is the one engines load
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if files:
            return files
    return []


def _read(path: Path, digest: Any, full: bool) -> None:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if full or size <= HEAD_BYTES + SAMPLES * SAMPLE_BYTES:
            while piece := file.read(HEAD_BYTES):
                digest.update(piece)
            return
        digest.update(file.read(HEAD_BYTES))
        for index in range(SAMPLES):
            file.seek(HEAD_BYTES + (size - HEAD_BYTES - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
