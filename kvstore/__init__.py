"""The store: see base.py for its face, build.py for how one is opened in this process, service/ for the node daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.layout import Layout
    from kvstore.service.client import RemoteStore
    from radix.namespace import Namespace


def connect(url: str, layout: Layout, namespace: Namespace, **options: Any) -> RemoteStore:
    """The store of a namespace, kept by the node daemon at `url`; see `kvstore.service.connect`."""
    from kvstore.service.connect import connect as connect_to

    return connect_to(url, layout, namespace, **options)
