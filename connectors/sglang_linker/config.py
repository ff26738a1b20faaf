"""The linker's part of SGLang's configuration: `linker_extra_config`, checked before the engine serves.

    --unified-cache-external-linker-config '{
        "linker": "KVStoreLinker", "linker_module_path": "connectors.sglang_linker",
        "linker_extra_config": {"host": {"capacity_bytes": "32GiB"}, "disk": {"path": "/nvme/kv"}}}'

It has the sections of `kvstore.Config` and, beside them, the fields of `LinkerFields`. Environment variables and a TOML
file count too, as everywhere; what is written here wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from kvstore.config.sections import Config
from kvstore.errors import ConfigError

OF_THE_CLIENT = ("store", "service")  # the other sections are a daemon's, where there is one
WHERE = "linker_extra_config"


@dataclass(frozen=True, slots=True)
class LinkerFields:
    """The settings of the linker alone.

    weights:          "sampled" identifies the weights by sizes, headers and samples of their files, "full" by all their
                      bytes; anything else is taken as the name of the weights, and you vouch for it.
    adapters_by_name: true if a name and path of `--lora-paths` means the same adapter on every engine and at any time:
                      SGLang's hashes say no more of it.
    """

    weights: str = "sampled"
    adapters_by_name: bool = False


@dataclass(frozen=True, slots=True)
class LinkerConfig:
    """Everything the linker was configured with."""

    store: Config
    fields: LinkerFields


def parse_linker_config(extra: Mapping[str, Any], config_path: str | None = None) -> LinkerConfig:
    """Check `extra`. Raises ConfigError naming the key, the value and what would be right."""
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{WHERE} is {extra!r}; it must be an object of sections")
    names = [field.name for field in fields(LinkerFields)]
    known = [*Config.section_names(), *names]
    for key in extra:
        head = str(key).split(".")[0]
        if head not in known:
            close = get_close_matches(head, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{WHERE}: unknown key {key!r}{hint}")
    own = LinkerFields(**{name: extra[name] for name in names if name in extra})
    if not isinstance(own.weights, str) or not own.weights:
        raise ConfigError(f"{WHERE}: weights is {own.weights!r}; it must be 'sampled', 'full' or a name")
    if not isinstance(own.adapters_by_name, bool):
        raise ConfigError(f"{WHERE}: adapters_by_name is {own.adapters_by_name!r}; it is true or false")
    sections = {key: value for key, value in extra.items() if str(key).split(".")[0] not in names}
    for key, value in sections.items():
        if "." not in key and not isinstance(value, Mapping):
            raise ConfigError(f"{WHERE}: {key} is {value!r}; it must be an object of fields")
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
