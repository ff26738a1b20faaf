"""The linker's part of SGLang's configuration: `linker_extra_config`, checked before the engine serves.

    --unified-cache-external-linker-config '{
        "linker": "KVStoreLinker", "linker_module_path": "connectors.sglang_linker",
        "linker_extra_config": {"host": {"capacity_bytes": "32GiB"}, "disk": {"path": "/nvme/kv"}}}'

It has the sections of `kvstore.Config` and, beside them, the fields of `ModelFields`. Environment variables and a TOML
file count too, as everywhere; what is written here wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from connectors.sglang.settings import ModelFields, split
from kvstore.config.sections import Config
from kvstore.errors import ConfigError

OF_THE_CLIENT = ("store", "service")  # the other sections are a daemon's, where there is one
WHERE = "linker_extra_config"


@dataclass(frozen=True, slots=True)
class LinkerConfig:
    """Everything the linker was configured with."""

    store: Config
    fields: ModelFields


def parse_linker_config(extra: Mapping[str, Any], config_path: str | None = None) -> LinkerConfig:
    """Check `extra`. Raises ConfigError naming the key, the value and what would be right."""
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{WHERE} is {extra!r}; it must be an object of sections")
    sections, own = split(extra, ModelFields, Config.section_names(), WHERE)
    store = Config.load(config_path, **sections)
    _check_store(store, sections)
    return LinkerConfig(store, own)


def _check_store(store: Config, sections: Mapping[str, Any]) -> None:
    if store.store.hash != "sha256":
        raise ConfigError(f"{WHERE}: store.hash is {store.store.hash!r}; SGLang's own page hashes need 'sha256'")
    if "block_size" in store.store.model_fields_set:
        raise ConfigError(f"{WHERE}: store.block_size is given; with SGLang it is SGLang's own: use --page-size")
    if store.store.single_flight:
        raise ConfigError(
            f"{WHERE}: store.single_flight is true; SGLang's linker has no answer that means 'ask again': leave it out"
        )
    if store.service.url is None:
        return
    for key in sections:
        if str(key).split(".")[0] not in OF_THE_CLIENT:
            raise ConfigError(
                f"{WHERE}: {key!r} is given beside service.url; the tiers are the daemon's, so configure them there "
                "(kvstore serve --set) and leave them out here"
            )
