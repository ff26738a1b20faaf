"""Weights are told apart by their files; adapters too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from connectors.vllm.identity import adapter_name, find_model, weights_name
from connectors.weights import HEAD_BYTES, files_digest
from kvstore.errors import ConfigError


def write(folder: Path, name: str = "model.safetensors", size: int = 4 << 20, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes((i * 7 + seed) % 251 for i in range(4096)) * (size // 4096))
    return folder


def engine(model: object, load_format: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None, seed=3),
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_equal_files_in_two_places_are_one_model(tmp_path: Path) -> None:
    assert files_digest(write(tmp_path / "a")) == files_digest(write(tmp_path / "b"))


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    assert files_digest(write(tmp_path / "a")) != files_digest(write(tmp_path / "b", seed=1))


def test_another_size_or_name_is_another_model(tmp_path: Path) -> None:
    digests = {
        files_digest(write(tmp_path / "a")),
        files_digest(write(tmp_path / "b", size=8 << 20)),
        files_digest(write(tmp_path / "c", name="other.safetensors")),
    }

    assert len(digests) == 3


def test_a_changed_byte_of_the_head_is_seen_and_full_sees_every_byte(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", size=16 << 20)
    before, full = files_digest(folder), files_digest(folder, full=True)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[HEAD_BYTES + 4096 + 1] ^= 1  # between two samples
    path.write_bytes(data)

    assert files_digest(folder) == before
    assert files_digest(folder, full=True) != full
    data[100] ^= 1
    path.write_bytes(data)
    assert files_digest(folder) != before


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weight files"):
        files_digest(tmp_path)


def test_weights_that_cannot_be_read_must_be_named() -> None:
    with pytest.raises(ConfigError, match='"weights": "NAME-AND-VERSION"'):
        weights_name(engine("/not/here"), "sampled")
    assert weights_name(engine("/not/here"), "llama-3 v2") == "named llama-3 v2"


def test_dummy_weights_are_their_seed() -> None:
    assert weights_name(engine("anything", "dummy"), "sampled") == "dummy seed 3"


def test_an_adapter_is_its_files_not_its_name(tmp_path: Path) -> None:
    def lora(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(lora_name="same", lora_path=str(folder))

    one = adapter_name(lora(write(tmp_path / "a", "adapter_model.safetensors", 8192)))
    two = adapter_name(lora(write(tmp_path / "b", "adapter_model.safetensors", 8192, seed=1)))

    assert one != two
    assert adapter_name(None) == ""
    with pytest.raises(ConfigError, match="adapter 'same'"):
        adapter_name(lora(tmp_path / "gone"))


def test_a_model_that_is_nowhere_is_nowhere() -> None:
    assert find_model("/not/here") is None
