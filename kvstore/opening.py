"""What an engine opens by configuration alone: its store, and a rank's view of the store's slots."""

from __future__ import annotations

from kvstore.base import KVStore
from kvstore.config.sections import Config
from kvstore.layout import Layout
from kvstore.service.client.connect import connect
from kvstore.service.client.slab import AttachedSlab, attach_slab
from radix.namespace import Namespace

__all__ = ["AttachedSlab", "attach_slab", "lossy_codec", "open_configured"]


def open_configured(
    config: Config, layout: Layout, namespace: Namespace, *, shared_name: str | None = None, rendering: str = ""
) -> KVStore:
    """Open the store that the configuration asks for: that of a daemon where `service.url` names one, else one in here.

    shared_name: for one in here, see `open_store`; the slab of a daemon on this machine is shared anyway.
    rendering:   the fingerprint of how the engine's server makes prompts of chats, for a daemon's operators.
    """
    service = config.service
    if service.url is None:
        from kvstore.build import open_store  # tiers and policies, which a client of a daemon needs none of

        return open_store(config, layout, namespace, shared_name=shared_name)
    return connect(
        service.url,
        layout,
        namespace,
        call_timeout_s=service.call_timeout_s,
        retry_max_s=service.retry_max_s,
        client=service.client_name or "",
        rendering=rendering,
    )


def lossy_codec(config: Config) -> str:
    """The codec of the tier in here that loses most; "" if none loses anything, or the tiers are a daemon's."""
    if config.service.url is not None:
        return ""
    from kvstore.build import loss_of_tiers

    loss = loss_of_tiers(config)
    return loss.word if loss else ""
