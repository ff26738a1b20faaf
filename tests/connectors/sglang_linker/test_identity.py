from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.sglang.identity import FILES, page_namespace
from kvstore.errors import ConfigError
from tests.helpers.stores import LAYOUT

HERE: dict[str, Any] = {
    "seat": "linker",
    "where": "linker_extra_config",
    "weights": "sampled",
    "version": "0.5.23",
    "device": "cpu AVX2",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def root(model: Path, rank: str = "tp0/2", /, *, arguments: dict[str, Any] | None = None, **here: Any) -> bytes:
    args = SimpleNamespace(model_path=str(model), **(arguments or {}))
    return page_namespace(args, LAYOUT, rank, **(HERE | here)).root()


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": {"kv_cache_dtype": "fp8_e5m2"}},
        {"arguments": {"quantization": "awq"}},
        {"arguments": {"json_model_override_args": "{}"}},
        {"arguments": {"attention_backend": "triton"}},
        {"arguments": {"decode_attention_backend": "triton"}},
        {"arguments": {"model_loader_extra_config": "{}"}},
        {"arguments": {"modelopt_quant": "fp8"}},
        {"weights": "mine"},
        {"version": "0.5.24"},
        {"seat": "backend"},
        {"device": "H200"},
    ],
)
def test_what_changes_the_bytes_changes_the_root(model: Path, change: dict[str, Any]) -> None:
    assert root(model, **change) != root(model)


def test_each_rank_has_names_of_its_own(model: Path) -> None:
    assert len({root(model, rank) for rank in ("", "tp0/2", "tp1/2", "tp0/4")}) == 4


def test_other_weights_at_the_same_path_are_another_model(model: Path) -> None:
    before = root(model)
    (model / "model.safetensors").write_bytes(b"trained")

    assert root(model) != before


def test_another_configuration_is_another_model_but_not_another_label(model: Path) -> None:
    before = root(model)
    (model / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "6"}))
    assert root(model) == before

    (model / "config.json").write_text(json.dumps({"hidden_size": 9}))
    assert root(model) != before


def test_weights_without_files_have_to_be_named() -> None:
    with pytest.raises(ConfigError, match='"weights": "NAME-AND-VERSION"'):
        root(Path("/no/such/model"))

    assert root(Path("/no/such/model"), weights="mine")


@pytest.mark.parametrize(
    "arguments",
    [{"load_format": "remote_instance"}, {"load_format": "rdma"}, {"weight_cache_mode": "client"}],
)
def test_weights_that_are_not_those_of_the_files_have_to_be_named(model: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='"weights": "NAME-AND-VERSION"'):
        root(model, arguments=arguments)

    assert root(model, arguments=arguments, weights="mine")


@pytest.mark.parametrize("name", FILES)
def test_another_content_of_a_file_that_an_argument_names_is_another_model(model: Path, name: str) -> None:
    file = model / "scales.json"
    file.write_text("1")
    before = root(model, arguments={name: str(file)})
    file.write_text("2")

    assert root(model, arguments={name: str(file)}) != before


def test_pages_with_draft_kv_depend_on_the_model_that_drafts(model: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"draft")
    arguments = {"speculative_draft_model_path": str(draft)}
    before = root(model, arguments=arguments, has_draft=True)
    assert root(model, arguments=arguments) == root(model)  # the model's own are the same with any

    (draft / "model.safetensors").write_bytes(b"trained")
    assert root(model, arguments=arguments, has_draft=True) != before


def test_adapters_that_are_named_by_their_path_have_to_be_vouched_for(model: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-paths is given"):
        root(model, arguments={"lora_paths": ["a=/a"]})

    assert root(model, arguments={"lora_paths": ["a=/a"]}, adapters_by_name=True)
