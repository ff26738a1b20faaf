"""Bytes of a token, as each model's config.json has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.geometry import PRESETS, find_geometry


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("llama-3-8b", 131_072),
        ("llama-3-70b", 327_680),
        ("qwen3-32b", 262_144),
        ("deepseek-v3", 70_272),
        ("gpt-oss-120b", 73_728),
        ("gpt-oss-20b", 49_152),
        ("qwen3-next-80b", 24_576),
    ],
)
def test_a_token_of_a_preset_has_so_many_bytes(name: str, token_bytes: int) -> None:
    assert PRESETS[name].token_bytes == token_bytes


def test_a_config_of_ones_own_is_read(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 14336, "vocab_size": 128256}))

    found = find_geometry(str(tmp_path))

    assert found.token_bytes == 131_072
    assert found.active == pytest.approx(8.03e9, rel=0.01)


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"kv_lora_rank": 512}'])
def test_what_is_no_config_or_says_more_than_is_known_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"config\.json"):
        find_geometry(str(tmp_path))


def test_a_name_that_is_none_shows_the_list() -> None:
    with pytest.raises(ConfigError, match="--model is 'llama'; it must be one of llama-3-8b"):
        find_geometry("llama")
