from __future__ import annotations

import subprocess
import sys

import pytest

import kvstore


@pytest.mark.parametrize("name", kvstore.__all__)
def test_what_the_package_promises_is_there(name: str) -> None:
    assert getattr(kvstore, name) is not None


def test_a_wrong_name_is_told_as_python_tells_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvstore.nothing


# What is imported -> what must not come along. Modules, not times: these are what starting takes long for.
LEAN = {
    "kvstore": "numpy torch redis lmdb pydantic email importlib.metadata asyncio",
    "kvstore.build": "torch redis lmdb pydantic email importlib.metadata asyncio aiohttp ssl rich typer",
    "kvstore.cli.app": "numpy torch redis lmdb pydantic email importlib.metadata asyncio aiohttp ssl rich",
    "kvstore.config.sections": "torch redis lmdb asyncio aiohttp ssl dotenv numpy rich typer",
    "kvstore.service.client.connect": "torch redis lmdb asyncio aiohttp prometheus_client rich typer",
    "kvstore.service.daemon.daemon": "torch redis lmdb transformers zstandard rich typer",
    "connectors.transformers": "torch transformers numpy pydantic",
}


@pytest.mark.parametrize("name", LEAN)
def test_importing_a_module_loads_nothing_that_it_can_do_without(name: str) -> None:
    code = f"import sys, {name}; print([m for m in {LEAN[name].split()} if m in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "[]"
