"""The connector's part of vLLM's configuration: `kv_connector_extra_config`, checked before the engine starts.

It has the sections of `kvstore.Config` (store, host, those of tiers, breaker, service) and, beside them, the few
fields of `ConnectorFields`. Environment variables and a TOML file count too, as everywhere; what is written here wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from connectors.answers import ALL, AUTO, PROMPT
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.tiers import registry

OF_THE_CLIENT = ("store", "service")  # the other sections are a daemon's, where there is one
ROLES = ("kv_both", "kv_producer", "kv_consumer")
# Set by vLLM itself or meant for it; they say nothing about us.
IGNORED = ("spec_name",)


@dataclass(frozen=True, slots=True)
class ConnectorFields:
    """The settings of the connector alone.

    load:            "async": a request waits aside while its pages are copied, others run on; "sync": the copy is part
                     of the step in which the request starts, beside its forward where the CPU runs the model; "auto":
                     "sync" for the first request of an idle engine where that is so, else "async".
    save:            "prompt": blocks of prompts; "all": blocks filled while decoding too; "auto": those of answers that
                     the next turn can begin with, by the chat template ("prompt" where none is known); "none": nothing.
    chat_template:   a file, where the server renders by another template than the tokenizer's (`--chat-template`).
    min_load_tokens: a hit that adds fewer tokens than this to vLLM's own prefix cache is not loaded.
    weights:         "sampled" identifies the weights by sizes, headers and samples of their files, "full" by all their
                     bytes; anything else is taken as the name of the weights, and you vouch for it.
    without_prefix_caching: use the store although vLLM's own prefix cache is off. vLLM turns it off by itself for
                     MLA on CPUs without AMX, where plain rotary positions are wrong (docs/vllm.md).
    require_redis:   a Redis server that does not answer at the start is an error; false: start without it, and use it
                     as soon as it answers.
    require_daemon:  the same of the daemon that `service.url` names.
    """

    load: str = "auto"
    save: str = AUTO
    chat_template: str = ""
    min_load_tokens: int = 0
    weights: str = "sampled"
    without_prefix_caching: bool = False
    require_redis: bool = True
    require_daemon: bool = True


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """Everything the connector was configured with."""

    store: Config
    fields: ConnectorFields
    loads: bool
    saves: bool


def parse_extra_config(
    extra: Mapping[str, Any], kv_role: str | None, config_path: str | None = None
) -> ConnectorConfig:
    """Check `extra` and what follows from the role.

    kv_role: kv_both loads and saves; kv_producer only saves; kv_consumer only loads.
    Raises ConfigError naming the key, the value and what would be right.
    """
    names = [field.name for field in fields(ConnectorFields)]
    known = [*Config.section_names(), *names]
    for key in extra:
        head = str(key).split(".")[0]
        if head not in known and key not in IGNORED:
            close = get_close_matches(head, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"kv_connector_extra_config: unknown key {key!r}{hint}")
    own = _fields({name: extra[name] for name in names if name in extra})
    sections = {key: value for key, value in extra.items() if str(key).split(".")[0] not in (*names, *IGNORED)}
    for key, value in sections.items():
        if "." not in key and not isinstance(value, Mapping):
            raise ConfigError(f"kv_connector_extra_config: {key} is {value!r}; it must be an object of fields")
    store = Config.load(config_path, **sections)
    if store.store.hash != "sha256":
        raise ConfigError(f"store.hash is {store.store.hash!r}; with vLLM's own block hashes it must be 'sha256'")
    if "block_size" in store.store.model_fields_set:
        raise ConfigError("store.block_size is given; with vLLM it is vLLM's own: use --block-size")
    if kv_role not in ROLES:
        raise ConfigError(f"kv_role is {kv_role!r}; it must be one of {', '.join(ROLES)} (kv_both for a cache)")
    _check_service(store, sections)
    loads, saves = kv_role != "kv_producer", kv_role != "kv_consumer" and own.save != "none"
    shared = bool(store.tiers()) or store.service.url is not None
    if not shared and not (loads and saves):
        what = f"kv_role {kv_role!r} and save {own.save!r}"
        raise ConfigError(
            f"{what} make no sense without {', '.join(registry.switches())} or service.url: host memory is this "
            f"engine's own, nothing would be {'loaded' if not saves else 'used'}"
        )
    if not (loads or saves):
        raise ConfigError(f"kv_role {kv_role!r} and save {own.save!r}: the connector would neither load nor save")
    return ConnectorConfig(store, own, loads, saves)


def _check_service(config: Config, sections: Mapping[str, Any]) -> None:
    if config.service.url is None:
        return
    for key in sections:
        if str(key).split(".")[0] not in OF_THE_CLIENT:
            raise ConfigError(
                f"kv_connector_extra_config: {key!r} is given beside service.url; the tiers are the daemon's, so "
                "configure them there (kvstore serve --set) and leave them out here"
            )


def _fields(given: Mapping[str, Any]) -> ConnectorFields:
    own = ConnectorFields(**given)
    for name, allowed in (("load", ("auto", "async", "sync")), ("save", (AUTO, PROMPT, ALL, "none"))):
        if getattr(own, name) not in allowed:
            raise ConfigError(
                f"kv_connector_extra_config: {name} is {getattr(own, name)!r}; it must be one of {', '.join(allowed)}"
            )
    least = own.min_load_tokens
    if not isinstance(least, int) or isinstance(least, bool) or least < 0:
        raise ConfigError(
            f"kv_connector_extra_config: min_load_tokens is {least!r}; it must be a number of tokens >= 0"
        )
    for name in ("without_prefix_caching", "require_redis", "require_daemon"):
        if not isinstance(getattr(own, name), bool):
            raise ConfigError(f"kv_connector_extra_config: {name} is {getattr(own, name)!r}; it is true or false")
    if not isinstance(own.chat_template, str):
        raise ConfigError(f"kv_connector_extra_config: chat_template is {own.chat_template!r}; it must be a file")
    if not isinstance(own.weights, str) or not own.weights:
        raise ConfigError(
            f"kv_connector_extra_config: weights is {own.weights!r}; it must be 'sampled', 'full' or a name"
        )
    return own
