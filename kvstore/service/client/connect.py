"""From a URL to a RemoteStore, and from a configuration to the store that it asks for."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

from kvstore.base import KVStore
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.service.client.connection import Dial, dial_http, dial_unix, unix_path
from kvstore.service.client.memory import SharedMemory, StagedMemory
from kvstore.service.client.staging import Staging
from kvstore.service.client.store import RemoteStore
from radix.namespace import Namespace

STAGING_BYTES = 256 << 20


def connect(
    url: str,
    layout: Layout,
    namespace: Namespace,
    *,
    token: str | None = None,
    tls_ca: Path | None = None,
    staging_bytes: int = STAGING_BYTES,
    call_timeout_s: float = 1.0,
    retry_max_s: float = 2.0,
    client: str = "",
) -> RemoteStore:
    """The store of a namespace, kept by the daemon at `url`: unix:///path/of/socket, or http(s)://host:port.

    token:  proves the tenant to a daemon over http.
    tls_ca: certificates to trust for https, PEM; None trusts those of the system.
    client: how the daemon's operators see this client; "" is the program's name and process id.
    staging_bytes: host memory here for pages on their way to and from another machine.

    A daemon that cannot be reached is no error: the store is empty until it can. Raises ConfigError or LayoutMismatch
    if the URL is none, or if the daemon refuses the namespace or the token.
    """
    dial, path = _dial(url, token, tls_ca)
    return RemoteStore(
        dial,
        layout,
        namespace,
        StagedMemory(Staging(layout, max(staging_bytes, layout.slot_bytes))) if path is None else SharedMemory(path),
        call_timeout_s=call_timeout_s,
        retry_max_s=retry_max_s,
        client=client or _own_name(),
    )


def _own_name() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return f"{name or 'python'} {os.getpid()}"


def _dial(url: str, token: str | None, tls_ca: Path | None) -> tuple[Dial, str | None]:
    path = unix_path(url)
    if path:
        return dial_unix(path), path
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("http", "https") or not host or not port:
        raise ConfigError(f"service.url is {url!r}; it must be unix:///path/of/socket or http(s)://host:port")
    if token is not None and any(not 32 < ord(char) < 127 for char in token):
        raise ConfigError("service.token has characters that a header cannot carry")
    context = None
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=None if tls_ca is None else str(tls_ca))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"service.tls_ca is {tls_ca}: {error}") from None
    return dial_http(host, port, context=context, token=token), None


def open_configured(config: Config, layout: Layout, namespace: Namespace, *, shared_name: str | None = None) -> KVStore:
    """The store that the configuration asks for: that of a daemon where `service.url` names one, else one in here.

    shared_name: for one in here, see `open_store`; the slab of a daemon on this machine is shared anyway.
    """
    service = config.service
    if service.url is None:
        from kvstore.build import open_store  # tiers and policies, which a client of a daemon needs none of

        return open_store(config, layout, namespace, shared_name=shared_name)
    return connect(
        service.url,
        layout,
        namespace,
        token=None if service.token is None else service.token.get_secret_value(),
        tls_ca=service.tls_ca,
        staging_bytes=service.staging_bytes,
        call_timeout_s=service.call_timeout_s,
        retry_max_s=service.retry_max_s,
        client=service.client_name or "",
    )
