"""The backend's part of SGLang's configuration, checked before the engine serves.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
        "backend_name": "kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreBackend",
        "disk": {"path": "/nvme/kv", "capacity_bytes": "200GiB", "ttl_s": "24h"}, "redis": {"url": "redis://..."}}'

The sections are those of `kvstore.Config`; environment variables and a TOML file count too, as everywhere, and what is
written here wins. What only a planner could do (host memory of ours, other policies than LRU, admission on second use)
is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.tiers import registry

SGLANGS_OWN = ("backend_name", "module_path", "class_name", "interface_v1")
# Sections that have no place here: what they are about, SGLang does itself or asks of nobody.
NOT_OURS = ("host", "service", "hints", "speculation")
WHERE = "--hicache-storage-backend-extra-config"


@dataclass(frozen=True, slots=True)
class BackendFields:
    """The settings of the backend alone.

    weights:          "sampled" identifies the weights by sizes, headers and samples of their files, "full" by all their
                      bytes; anything else is taken as the name of the weights, and you vouch for it.
    adapters_by_name: true if a name and path of `--lora-paths` means the same adapter on every engine and at any time:
                      SGLang's hashes say no more of it.
    save_deadline_s:  longest wait for a batch of pages that SGLang hands over; what is not stored then is not.
    close_timeout_s:  longest wait for what is under way when the backend is detached.
    """

    weights: str = "sampled"
    adapters_by_name: bool = False
    save_deadline_s: float = 8.0  # SGLang waits ten seconds for its threads when a backend is detached
    close_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Everything the backend was configured with."""

    store: Config
    fields: BackendFields


def parse_backend_config(extra: Mapping[str, Any] | None, config_path: str | None = None) -> BackendConfig:
    """Check `extra`. Raises ConfigError naming the key, the value and what would be right."""
    given = {key: value for key, value in (extra or {}).items() if key not in SGLANGS_OWN}
    names = [field.name for field in fields(BackendFields)]
    known = [*(section for section in Config.section_names() if section not in NOT_OURS), *names]
    for key in given:
        head = str(key).split(".")[0]
        if head == "host":
            raise ConfigError(f"{WHERE}: {key} is given; host memory is SGLang's own here: set --hicache-size")
        if head == "service":
            raise ConfigError(
                f"{WHERE}: {key} is given; a backend below SGLang's host memory opens disk and Redis itself, which "
                "engines of one machine may share: name the same disk.path; for a daemon use "
                "connectors.sglang_linker.KVStoreLinker"
            )
        if head == "tp_lcm_size":
            raise ConfigError(
                f"{WHERE}: tp_lcm_size is given; pages of another number of ranks are misses: leave it out"
            )
        if head not in known:
            close = get_close_matches(head, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigError(f"{WHERE}: unknown key {key!r}{hint}")
    sections = {key: value for key, value in given.items() if str(key).split(".")[0] not in names}
    for key, value in sections.items():
        if "." not in key and not isinstance(value, Mapping):
            raise ConfigError(f"{WHERE}: {key} is {value!r}; it must be an object of fields")
    store = Config.load(config_path, **sections)
    _check_store(store)
    return BackendConfig(store, _fields({name: given[name] for name in names if name in given}))


def _check_store(store: Config) -> None:
    if not store.tiers():
        switches = " nor ".join(registry.switches())
        raise ConfigError(f"{WHERE}: neither {switches} is given; the backend would have no place for pages")
    tiers = [(kind, store.tier(name)) for name, kind in registry.kinds().items()]  # also what is off: it is a mistake
    for field, usual in (("policy", "lru"), ("admit", "always"), ("exclusive", False), ("max_writes_per_day", None)):
        for kind, section in tiers:
            value = kind.value(section, field, usual)
            if value != usual:
                raise ConfigError(
                    f"{WHERE}: {kind.name}.{field} is {value!r}; a backend of SGLang can only do {usual!r}"
                )
    if "block_size" in store.store.model_fields_set:
        raise ConfigError(f"{WHERE}: store.block_size is given; with SGLang it is SGLang's own: use --page-size")


def _fields(given: Mapping[str, Any]) -> BackendFields:
    own = BackendFields(**given)
    _check("weights", own.weights, isinstance(own.weights, str) and bool(own.weights), "'sampled', 'full' or a name")
    _check("adapters_by_name", own.adapters_by_name, isinstance(own.adapters_by_name, bool), "true or false")
    for name in ("save_deadline_s", "close_timeout_s"):
        seconds = getattr(own, name)
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        _check(name, seconds, is_number and 0 <= seconds <= 600, "a number of seconds, 0 to 600")
    return own


def _check(name: str, value: object, is_right: bool, right: str) -> None:
    if not is_right:
        raise ConfigError(f"{WHERE}: {name} is {value!r}; it must be {right}")
