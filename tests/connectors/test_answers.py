"""The setting `save`, decided when a connector opens: by the template, or by default where none is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from connectors.answers import ALL, AUTO, PROMPT, SavedAnswers, decide
from connectors.vllm.answers import find_template
from connectors.vllm.config import ConnectorFields
from kvstore.demo.random_model import CHAT_TEMPLATE, byte_tokenizer
from kvstore.errors import ConfigError
from kvstore.prefix.answers import AnswerVerdict
from kvstore.prefix.rendering import Template
from kvstore.prefix.template import ModelTemplate, of_loaded
from kvstore.prefix.tokens import StandIn

log = logging.getLogger("connectors.test")
THINKS = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def nowhere() -> ModelTemplate:
    raise ConfigError("the tokenizer of x is not in the cache")


def broken() -> ModelTemplate:
    tokenizer: Any = SimpleNamespace(is_stand_in=False, name="broken", encode=lambda text: 1 / 0)
    return ModelTemplate("broken", Template(CHAT_TEMPLATE), tokenizer)


def strange() -> ModelTemplate:
    return of_loaded("strange", SimpleNamespace(chat_template="{{ messages }}"))


def stand_in() -> ModelTemplate:
    return ModelTemplate("file.jinja", Template(CHAT_TEMPLATE), StandIn())


@pytest.mark.parametrize(
    ("find", "why"),
    [
        (nowhere, "the tokenizer of x is not in the cache"),
        (broken, "ZeroDivisionError: division by zero"),
        (stand_in, "the model's tokenizer is not at hand"),
        (strange, "AttributeError: 'types.SimpleNamespace' object has no attribute 'special_tokens_map'"),
    ],
)
@pytest.mark.parametrize(("default", "is_saved"), [(ALL, True), (PROMPT, False)])
def test_what_cannot_be_known_is_done_as_by_default_and_told(
    find: Any, why: str, default: str, is_saved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "connectors"):
        saved = decide(AUTO, default, find, log)

    assert saved.told == f"auto, as {default!r}: {why}"
    assert caplog.messages == [f"kvstore: decoded pages that are saved: {saved.told}"]
    assert saved.saves_any is is_saved
    judge = saved.judge([1, 2])
    assert (judge is not None and judge.verdict is AnswerVerdict.SAVE) is is_saved


@pytest.mark.parametrize("save", [ALL, PROMPT])
def test_a_setting_that_is_not_auto_asks_no_template(save: str) -> None:
    def never() -> ModelTemplate:
        raise AssertionError("asked")

    saved = decide(save, PROMPT, never, log)

    assert (saved.told, saved.saves_any) == (save, save == ALL)


def write_tokenizer(folder: Path, template: str | None, **files: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def engine_of(tokenizer: Path | str, **changes: Any) -> Any:
    fields = {"tokenizer": str(tokenizer), "tokenizer_mode": "auto", "skip_tokenizer_init": False, **changes}
    return SimpleNamespace(model_config=SimpleNamespace(tokenizer_revision=None, **fields))


def test_a_vllm_engine_finds_the_template_of_its_tokenizer(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", THINKS)

    saved = decide(AUTO, PROMPT, lambda: find_template(engine_of(folder), ConnectorFields()), log)

    assert saved.told == "auto, no answer: the next prompt never begins with one (generation prompt not in history)"
    assert saved == decide(AUTO, PROMPT, lambda: of_loaded("model", byte_of(THINKS)), log)


def byte_of(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_vllm_engine_takes_the_template_that_its_server_was_given(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", THINKS)
    (tmp_path / "other.jinja").write_text(CHAT_TEMPLATE)
    fields = ConnectorFields(chat_template=str(tmp_path / "other.jinja"))

    saved = decide(AUTO, PROMPT, lambda: find_template(engine_of(folder), fields), log)

    assert saved.rules.keeps_all


@pytest.mark.parametrize(
    ("template", "files", "changes", "why"),
    [
        (None, {}, {}, "has no chat template"),
        (THINKS, {"tekken_json": json.dumps({})}, {}, "has a tokenizer of mistral-common"),
        (THINKS, {}, {"tokenizer_mode": "mistral"}, "with tokenizer_mode 'mistral' vLLM renders by rules of its own"),
        (THINKS, {}, {"skip_tokenizer_init": True}, "vLLM runs without a tokenizer"),
    ],
)
def test_a_vllm_engine_says_why_it_has_no_template(
    tmp_path: Path, template: str | None, files: dict[str, str], changes: dict[str, Any], why: str
) -> None:
    folder = write_tokenizer(tmp_path / "model", template, **files)

    with pytest.raises(ConfigError, match=why):
        find_template(engine_of(folder, **changes), ConnectorFields())


def test_a_tokenizer_of_a_hub_is_looked_for_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ConfigError, match="the tokenizer of nobody/nothing is not in the cache"):
        find_template(engine_of("nobody/nothing"), ConnectorFields())


@pytest.mark.parametrize("name", ["/models/model.gguf", "owner/model:Q4_K_M", "s3://bucket/model"])
def test_a_tokenizer_that_is_no_directory_keeps_no_engine_from_starting(name: str) -> None:
    saved = decide(AUTO, PROMPT, lambda: find_template(engine_of(name), ConnectorFields()), log)

    assert saved.told == f"auto, as 'prompt': the tokenizer {name} is neither a directory nor a hub id"


def test_rules_that_keep_nothing_save_nothing() -> None:
    saved = decide(AUTO, ALL, lambda: of_loaded("model", byte_of(THINKS)), log)

    assert isinstance(saved, SavedAnswers)
    assert not saved.saves_any
