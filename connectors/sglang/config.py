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
from dataclasses import dataclass
from typing import Any

from connectors.sglang.settings import ModelFields, check_value, split
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.tiers import registry

SGLANGS_OWN = ("backend_name", "module_path", "class_name", "interface_v1")
# Sections that have no place here: what they are about, SGLang does itself or asks of nobody.
NOT_OURS = ("host", "service", "hints", "speculation")
WHERE = "--hicache-storage-backend-extra-config"


REFUSED = {
    "host": "host memory is SGLang's own here: set --hicache-size",
    "service": "a backend below SGLang's host memory opens disk and Redis itself, which engines of one machine may "
    "share: name the same disk.path; for a daemon use connectors.sglang_linker.KVStoreLinker",
    "tp_lcm_size": "pages of another number of ranks are misses: leave it out",
}


@dataclass(frozen=True, slots=True)
class BackendFields(ModelFields):
    """The settings of the backend alone.

    save_deadline_s:  longest wait for a batch of pages that SGLang hands over; what is not stored then is not.
    close_timeout_s:  longest wait for what is under way when the backend is detached.
    """

    save_deadline_s: float = 8.0  # SGLang waits ten seconds for its threads when a backend is detached
    close_timeout_s: float = 10.0

    def check(self, where: str) -> None:
        """Raise ConfigError for a value that is none."""
        ModelFields.check(self, where)  # a class with slots has no super() without arguments
        for name in ("save_deadline_s", "close_timeout_s"):
            seconds = getattr(self, name)
            is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            check_value(where, name, seconds, is_number and 0 <= seconds <= 600, "a number of seconds, 0 to 600")


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Everything the backend was configured with."""

    store: Config
    fields: BackendFields


def parse_backend_config(extra: Mapping[str, Any] | None, config_path: str | None = None) -> BackendConfig:
    """Check `extra`. Raises ConfigError naming the key, the value and what would be right."""
    given = {key: value for key, value in (extra or {}).items() if key not in SGLANGS_OWN}
    for key in given:
        reason = REFUSED.get(str(key).split(".")[0])
        if reason is not None:
            raise ConfigError(f"{WHERE}: {key} is given; {reason}")
    ours = [section for section in Config.section_names() if section not in NOT_OURS]
    sections, own = split(given, BackendFields, ours, WHERE)
    store = Config.load(config_path, **sections)
    _check_store(store)
    return BackendConfig(store, own)


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
