"""From a URL to a RemoteStore."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from kvstore.config.secret import mask_url
from kvstore.config.values import daemon_url
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.service.client.connection import dial_unix
from kvstore.service.client.memory import SharedMemory
from kvstore.service.client.store import RemoteStore
from radix.namespace import Namespace


def connect(
    url: str,
    layout: Layout,
    namespace: Namespace,
    *,
    call_timeout_s: float = 1.0,
    retry_max_s: float = 2.0,
    client: str = "",
    rendering: str = "",
) -> RemoteStore:
    """Return the store of a namespace that the daemon at `url` keeps: unix:///path/of/socket, on this machine.

    client:    how the daemon's operators see this client; "" is the program's name and process id.
    rendering: the fingerprint of how chats become prompts here (kvstore.prefix); the daemon warns where clients differ.

    A daemon that cannot be reached is no error: the store is empty until it can. Raises ConfigError if the URL is none,
    and ConfigError or LayoutMismatch if the daemon refuses the namespace.
    """
    path = socket_path(url)
    return RemoteStore(
        dial_unix(path),
        layout,
        namespace,
        SharedMemory(path),
        call_timeout_s=call_timeout_s,
        retry_max_s=retry_max_s,
        client=client or _own_name(),
        rendering=rendering,
    )


def socket_path(url: str) -> str:
    """Return the path in the URL of a daemon's socket. Raises ConfigError if the URL is none."""
    try:
        return urlsplit(daemon_url(url)).path
    except ValueError as error:
        raise ConfigError(f"service.url is {mask_url(url)!r}; {error}") from None


def _own_name() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return f"{name or 'python'} {os.getpid()}"
