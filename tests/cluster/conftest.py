from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.replicas import REPLICA_OPTIONS, Server, end_all, make_model


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def replica(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that lives as long as the tests; whoever uses it leaves it idle."""
    options = ("--model", str(model_directory), "--name", "the-replica", *REPLICA_OPTIONS)
    server = Server(tmp_path_factory.mktemp("replica"), "replica", *options)
    try:
        server.wait_ready()
        yield server
    finally:
        end_all([server])
