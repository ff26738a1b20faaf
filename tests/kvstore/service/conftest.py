"""A client of the module's own `daemon` fixture, by HTTP and by its socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.service.client.store import RemoteStore
from tests.helpers.daemons import Http, LocalDaemon, attach


@pytest.fixture
def http(daemon: LocalDaemon) -> Http:
    return Http(daemon.daemon.app.port)


@pytest.fixture
def store(daemon: LocalDaemon) -> Iterator[RemoteStore]:
    assert daemon.config.service.socket is not None
    with attach(daemon.config.service.socket) as store:
        yield store
