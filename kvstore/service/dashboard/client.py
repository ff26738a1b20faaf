"""Asks a daemon for what its dashboard shows, over HTTP or over its unix socket. Blocking; one thread."""

from __future__ import annotations

import json
import socket
import ssl
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from kvstore.errors import ConfigError, KVStoreError, TierUnavailable
from kvstore.service.client.connection import unix_path

TIMEOUT_S = 5.0


class DashboardClient:
    """One daemon. A connection per question: a daemon that was restarted is simply asked again.

    url:    unix:///path/of/socket, or http(s)://host:port.
    token:  proves the tenant, over HTTP.
    tls_ca: certificates to trust for https, PEM; None trusts those of the system.
    """

    def __init__(self, url: str, token: str | None = None, tls_ca: Path | None = None) -> None:
        self.url = url
        self._token = token
        self._path = unix_path(url)
        self._parts = urlsplit(url)
        self._context: ssl.SSLContext | None = None
        if self._parts.scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=None if tls_ca is None else str(tls_ca))
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"service.tls_ca is {tls_ca}: {error}") from None

    def get(self, path: str, **query: Any) -> Any:
        """The answer of /v1/dashboard/PATH.

        Raises TierUnavailable if the daemon is not reached, KVStoreError for what it refuses.
        """
        connection = self._connect()
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        try:
            connection.request(
                "GET", f"/v1/dashboard/{path}" + (f"?{urlencode(query)}" if query else ""), None, headers
            )
            response = connection.getresponse()
            raw = response.read()
        except (OSError, HTTPException) as error:
            raise TierUnavailable(f"{self.url}: {_said(error)}; is a daemon running there? (kvstore serve)") from None
        finally:
            connection.close()
        if response.status == 401:
            raise KVStoreError(f"{self.url} wants a token: give --token, or set KVSTORE_SERVICE__TOKEN")
        try:
            answer = json.loads(raw)
        except ValueError:
            raise KVStoreError(f"{self.url} is no kvstore daemon: it answers {response.status} without JSON") from None
        if response.status != 200:
            raise KVStoreError(
                f"{self.url}: {answer.get('title', response.status)} {answer.get('detail', '')}".rstrip()
            )
        return answer

    def _connect(self) -> HTTPConnection:
        if self._path:
            return _UnixConnection(self._path)
        host, port = self._parts.hostname or "", self._parts.port
        if self._context is not None:
            return HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._context)
        return HTTPConnection(host, port, timeout=TIMEOUT_S)


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        try:
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
