"""From a URL to a RemoteStore."""

from __future__ import annotations

from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.service.client import RemoteStore
from kvstore.service.wire import dial_unix, unix_path
from radix.namespace import Namespace


def connect(
    url: str,
    layout: Layout,
    namespace: Namespace,
    *,
    call_timeout_s: float = 1.0,
    retry_max_s: float = 2.0,
    client: str = "",
) -> RemoteStore:
    """The store of a namespace, kept by the daemon at `url` (unix:///path/of/socket).

    A daemon that cannot be reached is no error: the store is empty until it can. Raises ConfigError or LayoutMismatch
    if the URL is none, or if the daemon refuses the namespace.
    """
    path = unix_path(url)
    if not path:
        raise ConfigError(f"service.url is {url!r}; it must be unix:///path/of/socket")
    return RemoteStore(
        dial_unix(path),
        layout,
        namespace,
        call_timeout_s=call_timeout_s,
        retry_max_s=retry_max_s,
        client=client,
    )
