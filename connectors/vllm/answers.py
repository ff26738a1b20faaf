"""The chat template that vLLM's server renders by, as far as an engine can know it.

The server and the engine are two processes. The engine knows the tokenizer's name, and with it the template, unless the
server was given another one (`--chat-template`), of which `chat_template` tells us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from connectors.vllm.config import ConnectorFields
from kvstore.errors import ConfigError
from kvstore.prefix.template import ModelTemplate, load

HF_MODES = ("auto", "hf")  # with the others vLLM renders by rules of its own


def find_template(vllm_config: Any, fields: ConnectorFields) -> ModelTemplate:
    """Return the template and the tokenizer of the model. Asks no hub. Raises ConfigError if they are not at hand."""
    model = vllm_config.model_config
    mode = str(getattr(model, "tokenizer_mode", "auto"))
    if getattr(model, "skip_tokenizer_init", False):
        raise ConfigError("vLLM runs without a tokenizer")
    if mode not in HF_MODES:
        raise ConfigError(f"with tokenizer_mode {mode!r} vLLM renders by rules of its own")
    folder = _folder(str(model.tokenizer), getattr(model, "tokenizer_revision", None))
    if mode == "auto" and (folder / "tekken.json").is_file():
        raise ConfigError(f"{model.tokenizer} has a tokenizer of mistral-common, which renders by rules of its own")
    if fields.chat_template:
        return load(fields.chat_template, str(folder))
    return load(str(folder))


def _folder(name: str, revision: str | None) -> Path:
    """Return the directory of a tokenizer: itself, or that of a hub id in the cache, where vLLM has put it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache  # comes with vLLM

    try:
        found = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
    except ValueError:  # a file (GGUF), or a place in an object store
        raise ConfigError(f"the tokenizer {name} is neither a directory nor a hub id") from None
    if not isinstance(found, str):
        raise ConfigError(f"the tokenizer of {name} is not in the cache")
    return Path(found).parent
