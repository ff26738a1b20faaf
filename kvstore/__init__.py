"""A tiered store of KV-cache pages.

    from kvstore import Config, open_store, connect

`open_store(config, layout, namespace)` opens a store in this process, `connect(url, layout, namespace)` one that a node
daemon keeps; both have the face of `kvstore.base.KVStore`. Importing the package loads none of that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvstore import names as _names

_names.require("radix", "eviction")

if TYPE_CHECKING:
    from kvstore.base import KVStore
    from kvstore.build import open_store
    from kvstore.config.sections import Config
    from kvstore.errors import KVStoreError
    from kvstore.layout import GroupKind, LayerGroup, Layout
    from kvstore.plan.records import LoadLease, Match, RequestOptions
    from kvstore.service.client.store import RemoteStore
    from radix.namespace import Namespace

__all__ = [
    "Config",
    "GroupKind",
    "KVStore",
    "KVStoreError",
    "LayerGroup",
    "Layout",
    "LoadLease",
    "Match",
    "Namespace",
    "RequestOptions",
    "connect",
    "open_store",
]

_HOMES = {
    "Config": "kvstore.config.sections",
    "GroupKind": "kvstore.layout",
    "KVStore": "kvstore.base",
    "KVStoreError": "kvstore.errors",
    "LayerGroup": "kvstore.layout",
    "Layout": "kvstore.layout",
    "LoadLease": "kvstore.plan.records",
    "Match": "kvstore.plan.records",
    "Namespace": "radix.namespace",
    "RequestOptions": "kvstore.plan.records",
    "open_store": "kvstore.build",
}


def connect(url: str, layout: Layout, namespace: Namespace, **options: Any) -> RemoteStore:
    """The store of a namespace, kept by the node daemon at `url`; see `kvstore.service.client.connect`."""
    from kvstore.service.client.connect import connect as connect_to
    from kvstore.service.client.connect import socket_path

    # Before the options are looked at: a caller who means a daemon on another machine also gives a token for it, and is
    # to be told of the former.
    socket_path(url)
    return connect_to(url, layout, namespace, **options)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(import_module(home), name)
