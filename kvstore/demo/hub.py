"""Is a model at the hub? Asked once and briefly, before transformers retries for two minutes.

The hub's own client asks: it knows the endpoint, the token and the cache. What lies in the cache is not asked for.
"""

from __future__ import annotations

from kvstore.errors import KVStoreError

HUB_TIMEOUT_S = 10.0  # a guess for a slow line; the answer is a few KiB


class ModelUnavailable(KVStoreError):
    """A model cannot be had: not found, not downloaded, not what it should be, or not converted."""


def check_hub_model(name: str) -> None:
    """Return if `name` ("owner/name", or an old id without an owner) is in the cache or at the hub.

    Raises ModelUnavailable: the hub has no such model, it may not be read with this token, or the hub cannot be asked.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hint = "give a directory, a hub id like 'owner/name', or 'random'"
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError as error:
        raise ModelUnavailable(f"model: there is no directory {name!r}, and no hub id is like that; {hint}") from error
    if constants.HF_HUB_OFFLINE:
        raise ModelUnavailable(f"model: {name!r} is not in the cache and HF_HUB_OFFLINE is set; {hint}")
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelUnavailable(f"model: {name!r} is gated; accept its terms at the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"model: the hub has no model {name!r} (or not for this token, HF_TOKEN); {hint}"
        ) from error
    except Exception as error:
        # Its transport raises classes of its own, other ones in each major version (requests, httpx, httpx2).
        raise ModelUnavailable(
            f"model: {name!r} is not in the cache, and the hub cannot be asked ({error}); {hint}"
        ) from error
