"""The start of the scheduler's half: from vLLM's configuration to a store that is open and can be relied on.

Here everything may raise ConfigError, for nothing runs yet: what could not work later is said now.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from connectors.answers import PROMPT, decide
from connectors.vllm.answers import find_template
from connectors.vllm.config import ConnectorConfig
from connectors.vllm.identity import adapter_name, engine_namespace
from connectors.vllm.layout import EngineLayout
from connectors.vllm.scheduler import SchedulerHalf
from kvstore.base import KVStore
from kvstore.errors import ConfigError
from kvstore.opening import open_configured
from kvstore.tiers.kind import TierKind

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply


def open_half(
    vllm_config: Any,
    config: ConnectorConfig,
    engine: EngineLayout,
    vllm_version: str,
    *,
    is_beside: bool = False,
    is_whole: bool = False,
) -> SchedulerHalf:
    """Open the store, in this process or by its daemon, and make the half over it. Raises ConfigError.

    is_beside: workers can copy beside the forward (layers.py).
    is_whole:  vLLM can compute the last token alone of a prompt that was loaded to its end.
    """
    namespace = engine_namespace(vllm_config, engine.layout, weights=config.fields.weights, vllm_version=vllm_version)
    # Private memory gets huge pages, shared memory seldom: disks read twice as fast into them. So it is shared only
    # where a worker is another process.
    is_alone = vllm_config.parallel_config.distributed_executor_backend == "uni"
    shared_name = None if is_alone else f"kvstore-{os.getpid()}"
    store = open_configured(config.store, engine.layout, namespace, shared_name=shared_name)
    try:
        check_service(store, config)
        warn_of_hash(vllm_config, config)
        check_servers(store, config, engine.layout.block_size)
    except ConfigError:
        store.close(0)
        raise
    world = int(vllm_config.parallel_config.tensor_parallel_size)
    answers = decide(config.fields.save, PROMPT, lambda: find_template(vllm_config, config.fields), log)
    half = SchedulerHalf(
        store,
        engine,
        config,
        world=world,
        is_beside=is_beside,
        is_whole=is_whole,
        identify=_adapters(),
        answers=answers,
    )
    log.info(
        "kvstore: %s, blocks of %d tokens, %d layer groups, namespace %s, tiers %s, daemon %s",
        ", ".join(f"{slab.num_slots} host slots of {slab.slot_bytes >> 10} KiB" for slab in store.slots.slabs)
        or "no daemon",
        engine.layout.block_size,
        len(engine.layout.groups),
        namespace.root().hex()[:12],
        ", ".join(kind.name for kind, _ in config.store.tiers()) or "none",
        config.store.service.url or "off",
    )
    return half


def check_service(store: KVStore, config: ConnectorConfig) -> None:
    """Raise ConfigError if a daemon is configured and not there, unless that is allowed."""
    if config.store.service.url is not None and config.fields.require_daemon and not store.slots.slabs:
        raise ConfigError(
            f"service.url is {config.store.service.url!r}, and no daemon answers there; start it (kvstore serve) or "
            'set "require_daemon": false in kv_connector_extra_config to start without it'
        )


def check_servers(store: KVStore, config: ConnectorConfig, block_size: int) -> None:
    """Ask tiers on servers about a page that nobody has. Raises ConfigError if there is no answer in time."""
    if config.store.service.url is not None or not config.fields.require_redis:
        return
    for kind, section in config.store.tiers():
        if kind.ask is not None:
            wait_s = kind.value(section, "connect_timeout_s", 0.0) + kind.value(section, "timeout_s", 2.0)
            _check_server(store, kind, wait_s, block_size)


def _check_server(store: KVStore, kind: TierKind[Any], wait_s: float, block_size: int) -> None:
    nobody = store.request_from_hashes([secrets.token_bytes(32)], block_size + 1)
    until = time.monotonic() + wait_s
    match = store.wait_lookup(nobody, wait_s)
    while match.pending and time.monotonic() < until:
        match = store.wait_lookup(nobody, until - time.monotonic())
    store.keep.finished(nobody)
    errors = store.stats().get("lane_errors", {}).get(kind.name, {})
    if match.pending or any(errors.values()):
        raise ConfigError(
            f"{kind.name}.{kind.switch}: the server does not answer within {wait_s:.1f} s; start it or mend the URL, "
            'or set "require_redis": false in kv_connector_extra_config to start without it'
        )


def warn_of_hash(vllm_config: Any, config: ConnectorConfig) -> None:
    """Warn if vLLM hashes with a seed of this process alone, though others could share what is stored."""
    name = str(getattr(vllm_config.cache_config, "prefix_caching_hash_algo", ""))
    is_shared = bool(config.store.tiers()) or config.store.service.url is not None
    if name.startswith("xxhash") and "PYTHONHASHSEED" not in os.environ and is_shared:
        log.warning(
            "kvstore: with prefix_caching_hash_algo %r vLLM draws a seed at every start, so no other process, nor this "
            "one after a restart, finds what is stored; set PYTHONHASHSEED to one number everywhere, or use 'sha256'",
            name,
        )


def _adapters() -> Callable[[Any], str]:
    """The identity of a request's adapter, read once per path."""
    known: dict[str, str] = {}

    def identify(request: Any) -> str:
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return ""
        path = str(lora.lora_path)
        if path not in known or getattr(lora, "load_inplace", False):
            known[path] = adapter_name(lora)
        return f"lora {known[path]}"

    return identify
