"""The promises of every tier, kept over all servers, all ways to deploy them and all kinds of connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from kvstore.testing.redis_server import LocalRedis
from tests.helpers.redis_contract import ALL, RedisContract, opened
from tests.helpers.redis_medium import Medium


@pytest.fixture(scope="module", params=ALL)
def medium(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Medium]:
    with opened(request.param, tmp_path_factory) as medium:
        yield medium


@pytest.fixture(scope="module")
def plain_medium() -> Iterator[Medium]:
    with LocalRedis() as server, closing(Medium([server], server.url)) as medium:
        yield medium


@pytest.mark.usefixtures("medium")  # so that each kind has all its tests, and then its servers go
class TestRedisTier(RedisContract):
    pass


class TestRedisTierWithCodec(RedisContract):
    codec = "lossless"
    servers = "plain_medium"
