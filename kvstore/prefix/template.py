"""A model's chat template, special tokens and tokenizer: from a directory, a hub id or a `.jinja` file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError, KVStoreError
from kvstore.extras import how_to_install
from kvstore.prefix.rendering import Template
from kvstore.prefix.tokens import HubTokenizer, StandIn, Tokenizer, fast_tokenizer

MAX_FILE_BYTES = 64 << 20  # the largest tokenizer_config.json seen has 7 MB
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# In the place of a template that is not at hand: every message as it is, which can only be appended to. `kvstore
# prefix --log` without a template sees by it what clients change.
PLAIN = Template(
    "{% for tool in tools or [] %}<|tool|>{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}{% elif message.content %}{{ message.content | tojson }}"
    "{% endif %}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Where a template is a file without a tokenizer beside it: the names that most templates write.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLACEHOLDERS = {"bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True, slots=True)
class ModelTemplate:
    """A template with the tokenizer that belongs to it.

    name:  for reports. notes: what was assumed, a sentence each.
    """

    name: str
    template: Template
    tokenizer: Tokenizer
    notes: tuple[str, ...] = field(default=())


def load(source: str, tokenizer: str | None = None) -> ModelTemplate:
    """Find a template and its tokenizer.

    source:    a model or tokenizer directory, a hub id, or a file with a Jinja template.
    tokenizer: another directory or hub id for the tokens and the special tokens.
    Raises ConfigError, and KVStoreError where a hub cannot be asked.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _of_directory(path)
    elif path.is_file():
        text = _read(path)
        found = ModelTemplate(
            path.name,
            Template(text, PLACEHOLDERS),
            StandIn(),
            ("no tokenizer beside the template: tokens are estimated by a stand-in, bos is <s>, eos is </s>",),
        )
    elif _HUB_ID.fullmatch(source):
        found = _of_hub(source)
    else:
        raise ConfigError(f"{source!r} is neither a directory, nor a file, nor a hub id like 'owner/name'")
    if tokenizer is None:
        return found
    own = _tokens_of(tokenizer)
    return ModelTemplate(found.name, Template(found.template.text, own[1]), own[0])


def of_loaded(name: str, loaded: Any) -> ModelTemplate:
    """Return the template of a tokenizer that transformers has loaded. Raises ConfigError if it has none."""
    text = _in_settings(getattr(loaded, "chat_template", None))
    if text is None:
        raise ConfigError(f"{name} has no chat template")
    return ModelTemplate(name, Template(text, _special_of(loaded)), HubTokenizer(name, loaded))


def plain(tokenizer: str | None = None) -> ModelTemplate:
    """Return the template in the place of one that is not at hand: it keeps every prefix that a client keeps."""
    note = "no template named: messages are put one after another, so only what clients change is seen"
    found = ModelTemplate("plain", PLAIN, StandIn(), (note,))
    if tokenizer is None:
        return found
    return ModelTemplate("plain", PLAIN, _tokens_of(tokenizer)[0], (note,))


def _of_directory(path: Path) -> ModelTemplate:
    settings = _settings(path)
    file = path / "chat_template.jinja"
    text = _read(file) if file.is_file() else _in_settings(settings.get("chat_template"))
    if text is None and (path / "chat_template.json").is_file():
        text = _in_settings(_json(path / "chat_template.json").get("chat_template"))
    if text is None:
        raise ConfigError(f"{path} has no chat template: no chat_template.jinja, none in tokenizer_config.json")
    if (path / "tokenizer.json").is_file() or settings:
        tokenizer, special, *notes = _tokens_of_directory(path)
        return ModelTemplate(path.resolve().name, Template(text, special), tokenizer, tuple(notes))
    note = "no tokenizer beside the template: tokens are estimated by a stand-in, bos is <s>, eos is </s>"
    return ModelTemplate(path.resolve().name, Template(text, PLACEHOLDERS), StandIn(), (note,))


def _tokens_of(tokenizer: str) -> tuple[Any, ...]:
    """Return the tokenizer in a directory or of a hub id, the special tokens, and notes."""
    folder = Path(tokenizer).expanduser()
    if folder.is_dir():
        return _tokens_of_directory(folder)
    if not _HUB_ID.fullmatch(tokenizer):
        raise ConfigError(f"the tokenizer {tokenizer!r} is neither a directory nor a hub id like 'owner/name'")
    return _tokens_of_hub(tokenizer)


def _tokens_of_directory(path: Path) -> tuple[Any, ...]:
    """Return the tokenizer, the special tokens, and notes."""
    special = _special(_settings(path))
    if (path / "tokenizer.json").is_file():
        return fast_tokenizer(path / "tokenizer.json"), special
    return StandIn(), special or PLACEHOLDERS, f"{path.name} has no tokenizer.json: tokens are estimated by a stand-in"


def _of_hub(name: str) -> ModelTemplate:
    return of_loaded(name, _load_hub(name))


def _tokens_of_hub(name: str) -> tuple[Any, ...]:
    loaded = _load_hub(name)
    return HubTokenizer(name, loaded), _special_of(loaded)


def _load_hub(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(
            f"{name} is no directory, and a hub id needs transformers; {how_to_install('prefix')}"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise KVStoreError(f"the tokenizer of {name} cannot be had: {str(error)[:300]}") from error


def _special_of(loaded: Any) -> dict[str, str]:
    return {key: str(value) for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}


def _settings(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return _json(file) if file.is_file() else {}


def _special(settings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _in_settings(value: Any) -> str | None:
    """Return the template of a setting: a text, or the one called "default" of several."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        text = named.get("default", next(iter(named.values()), None))
        return text if isinstance(text, str) else None
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {str(error)[:200]}") from None
    return value if isinstance(value, dict) else {}


def _read(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ConfigError(f"{file} has {size} bytes; no more than {MAX_FILE_BYTES} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is no text") from None
