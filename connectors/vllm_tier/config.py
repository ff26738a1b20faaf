"""The tier's part of vLLM's configuration: its entry in `secondary_tiers`, checked before the engine starts.

    {"type": "KVStoreTier", "module_path": "connectors.vllm_tier",
     "disk": {"path": "/nvme/kv", "capacity_bytes": "200GiB", "ttl_s": "24h"}, "redis": {"url": "redis://..."}}

The sections are those of `kvstore.Config`; environment variables and a TOML file count too, as everywhere, and
what is written in the entry wins. What only a planner could do (host memory of ours, other policies than LRU, admission
on second use) is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.tiers import registry

NOT_OURS = ("host", "service")  # sections of the configuration that have no place here
WHERE = "secondary_tiers, KVStoreTier"
LOCALITIES = ("LOCAL", "REMOTE")


@dataclass(frozen=True, slots=True)
class TierFields:
    """The settings of the tier alone.

    weights:          "sampled" identifies the weights by sizes, headers and samples of their files, "full" by all their
                      bytes; anything else is taken as the name of the weights, and you vouch for it.
    adapters_by_name: True if one LoRA name means the same adapter on every engine and at any time: vLLM tells a tier
                      no more of an adapter than its name and path.
    enable_kv_events: tell routers what is stored here, where vLLM's kv_events_config is on.
    locality:         "LOCAL" or "REMOTE", for requests that choose by it; None means by what is configured.
    close_timeout_s:  longest wait for saves under way when the engine stops.
    """

    weights: str = "sampled"
    adapters_by_name: bool = False
    enable_kv_events: bool = False
    locality: str | None = None
    close_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class TierConfig:
    """Everything the tier was configured with."""

    store: Config
    fields: TierFields


def parse_tier_config(given: Mapping[str, Any], config_path: str | None = None) -> TierConfig:
    """Check the keys of a `secondary_tiers` entry, without `type` and `module_path`.

    Raises ConfigError naming the key, the value and what would be right.
    """
    names = [field.name for field in fields(TierFields)]
    known = [*(section for section in Config.section_names() if section not in NOT_OURS), *names]
    for key in given:
        head = str(key).split(".")[0]
        if head == "host":
            raise ConfigError(
                f"{WHERE}: {key} is given; host memory is vLLM's own here: set cpu_bytes_to_use beside secondary_tiers"
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
    return TierConfig(store, _fields({name: given[name] for name in names if name in given}))


def _check_store(store: Config) -> None:
    if not store.tiers():
        switches = " nor ".join(registry.switches())
        raise ConfigError(f"{WHERE}: neither {switches} is given; the tier would have no place for pages")
    tiers = [(kind, store.tier(name)) for name, kind in registry.kinds().items()]  # also what is off: it is a mistake
    for name, value, only in (
        ("store.hash", store.store.hash, "sha256"),
        *((f"{kind.name}.policy", kind.value(section, "policy", "lru"), "lru") for kind, section in tiers),
        *((f"{kind.name}.admit", kind.value(section, "admit", "always"), "always") for kind, section in tiers),
        *((f"{kind.name}.exclusive", kind.value(section, "exclusive", False), False) for kind, section in tiers),
        *(
            (f"{kind.name}.max_writes_per_day", kind.value(section, "max_writes_per_day", None), None)
            for kind, section in tiers
        ),
    ):
        if value != only:
            raise ConfigError(f"{WHERE}: {name} is {value!r}; a secondary tier of vLLM can only do {only!r}")
    if "block_size" in store.store.model_fields_set:
        raise ConfigError(f"{WHERE}: store.block_size is given; with vLLM it is vLLM's own: use --block-size")


def _fields(given: Mapping[str, Any]) -> TierFields:
    own = TierFields(**given)
    _check("weights", own.weights, isinstance(own.weights, str) and bool(own.weights), "'sampled', 'full' or a name")
    for name in ("adapters_by_name", "enable_kv_events"):
        _check(name, getattr(own, name), isinstance(getattr(own, name), bool), "true or false")
    _check("locality", own.locality, own.locality is None or own.locality in LOCALITIES, "'LOCAL' or 'REMOTE'")
    seconds = own.close_timeout_s
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    _check("close_timeout_s", seconds, is_number and 0 <= seconds <= 600, "a number of seconds, 0 to 600")
    return own


def _check(name: str, value: object, is_right: bool, right: str) -> None:
    if not is_right:
        raise ConfigError(f"{WHERE}: {name} is {value!r}; it must be {right}")
