"""All that depends on the version of vLLM: which are supported, and where they keep what we use.

vLLM calls its connector interface experimental and changes it between minor releases, so a version that was not tested
is refused with a clear message instead of failing somewhere inside an engine step. What is written here holds for all
of SUPPORTED; between 0.32 and 0.33 nothing that we call has changed, and what 0.33 calls beside it is
`unregister_kv_caches`/`restore_kv_caches` (sleep, vllm.py) and `submit_load(..., expedited)` (cpu_spec.py).
"""

from __future__ import annotations

from typing import Any

from connectors.vllm.events import News
from kvstore.base import HOST
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.tiers import registry

SUPPORTED = ("0.32", "0.33")  # minor releases the engine tests have run with


def check_version(version: str) -> None:
    """Raise ConfigError unless `version` is of a supported minor release."""
    if ".".join(version.split("+")[0].split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"vLLM {version} is not supported by this release of kvtiers; supported are "
            f"{' and '.join(f'{minor}.x' for minor in SUPPORTED)}. Install vllm=={SUPPORTED[-1]}.* "
            "or a kvtiers release that names yours"
        )


def null_safe_block_ids(scheduler_output: Any, request_id: str) -> Any:
    """vLLM's block ids of a scheduled request, one list per group; None if it was not scheduled."""
    state = scheduler_output.kv_connector_block_state
    return None if state is None else state.get_block_ids(request_id)


def can_load_whole(vllm_config: Any, layout: Layout) -> bool:
    """Whether a load may go to the very end of a prompt, of which vLLM then computes the last token alone.

    Its scheduler takes that token back when an asynchronous load has ended (`_update_waiting_for_remote_kv`). Not with
    sliding windows, whose blocks it chooses before it does so, nor where drafts are made from the model's hidden
    states (EAGLE, MTP): those have to be computed.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and speculative.use_eagle():
        return False
    return len(layout.groups) == 1 and layout.groups[0].window is None


def kv_event(news: News, block_size: int) -> Any:
    """The event that tells a router which blocks can be had here, or no longer."""
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    hashes = [maybe_convert_block_hash(one) for one in news.hashes]
    place = {"medium": news.medium, "group_idx": news.group, "locality": "LOCAL", "ownership": "kvstore"}
    if not news.is_stored:
        return BlockRemoved(block_hashes=hashes, **place)
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=None,
        token_ids=[],
        block_size=block_size,
        lora_id=None,
        lora_name=None,
        **place,
    )


def all_cleared() -> Any:
    """The event that tells a router to forget what it knows of this engine."""
    from vllm.distributed.kv_events import AllBlocksCleared

    return AllBlocksCleared()


def hit_sources(tokens: dict[str, int]) -> dict[Any, int]:
    """Tokens by tier in vLLM's words; a server has none there, so it is "external"."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    names = {HOST: CacheHitSource.HOST, "storage": CacheHitSource.DISK}
    sources: dict[Any, int] = {}
    for tier, count in tokens.items():
        source = names.get(tier if tier == HOST else registry.medium(tier), CacheHitSource.EXTERNAL_UNSPECIFIED)
        sources[source] = sources.get(source, 0) + count
    return sources
