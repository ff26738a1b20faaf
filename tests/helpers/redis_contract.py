"""The contract of tiers for Redis: over all servers, all ways to deploy them and all kinds of connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import pytest

from kvstore.codecs.coder import PageCoder
from kvstore.page import PageKey
from kvstore.testing.contracts.tier import TierContract
from kvstore.testing.pages import FakeClock
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.base import Tier
from kvstore.tiers.redis.refusal import Account
from kvstore.tiers.redis.tier import RedisTier
from tests.helpers.redis_medium import Medium
from tests.helpers.redis_products import find_product
from tests.helpers.redis_server import NEEDS_OPENSSL, NEEDS_REDIS, command, make_certificate
from tests.helpers.redis_topologies import Kind, cluster, topology

SLOT_BYTES = 8192
PREFIX = "kv-test"

Open = Callable[[ExitStack, pytest.TempPathFactory], Medium]


def deployed(product: str, kind: Kind, stack: ExitStack, paths: pytest.TempPathFactory) -> Medium:
    servers = stack.enter_context(topology(kind, find_product(product).binary))
    return Medium(servers.primaries, servers.url)


def over_unix(stack: ExitStack, paths: pytest.TempPathFactory) -> Medium:
    server = stack.enter_context(LocalRedis(password="p@ss/word"))
    return Medium([server], server.unix_url)


def over_tls(stack: ExitStack, paths: pytest.TempPathFactory) -> Medium:
    cert, key = make_certificate(paths.mktemp("tls"))
    server = stack.enter_context(LocalRedis(tls_cert=cert, tls_key=key, password="secret"))
    return Medium([server], server.url)


def cluster_over_tls(stack: ExitStack, paths: pytest.TempPathFactory) -> Medium:
    tls = make_certificate(paths.mktemp("tls"))
    servers = stack.enter_context(cluster(find_product("redis").binary, replicas=0, tls=tls))
    return Medium(servers.primaries, servers.url)


def by_an_account(product: str, kind: Kind, stack: ExitStack, paths: pytest.TempPathFactory) -> Medium:
    """An account that may do what docs/redis.md names, and nothing else."""
    servers = stack.enter_context(topology(kind, find_product(product).binary))
    extra = ("cluster|slots",) if kind == "cluster" else ()
    rule = Account("app", f"{PREFIX}*", extra).rule.split()
    medium = Medium(servers.primaries, servers.url.replace("://", "://app:secret@"))
    for node in servers.nodes:
        command(node, *rule, "on", ">secret")
    return medium


_OPEN: dict[str, Open] = {
    **{
        f"{product}-{kind}": partial(deployed, product, kind)
        for product in ("redis", "valkey")
        for kind in ("single", "sentinel", "cluster")
    },  # type: ignore[dict-item]
    "unix": over_unix,
    "tls": over_tls,
    "cluster-tls": cluster_over_tls,
    "account": partial(by_an_account, "redis", "single"),
    "cluster-account": partial(by_an_account, "valkey", "cluster"),
}
_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "tls": [NEEDS_OPENSSL],
    "cluster-tls": [NEEDS_OPENSSL, pytest.mark.slow],
    "cluster-account": [pytest.mark.slow],
    "valkey-sentinel": [pytest.mark.slow],
}


# For a fixture of a module that gives what `opened` makes of its parameter.
ALL = [pytest.param(name, marks=_MARKS.get(name, ())) for name in _OPEN]


@contextmanager
def opened(name: str, paths: pytest.TempPathFactory) -> Iterator[Medium]:
    """The servers of one name of ALL."""
    with ExitStack() as stack:
        medium = _OPEN[name](stack, paths)
        stack.callback(medium.close)
        yield medium


class RedisContract(TierContract):
    """The contract on the servers of the fixture `servers`."""

    pytestmark = NEEDS_REDIS
    slot_bytes = SLOT_BYTES
    is_bounded = False
    can_scan = False
    codec = "exact"
    servers = "medium"

    @pytest.fixture
    def tier(self, clock: FakeClock, request: pytest.FixtureRequest) -> Iterator[Tier]:
        self.raw: Medium = request.getfixturevalue(self.servers)
        self.raw.flush()
        with closing(
            RedisTier(
                self.raw.url,
                prefix=PREFIX,
                slot_bytes=SLOT_BYTES,
                ttl_s=3600,
                coder=PageCoder(self.codec),
                now=clock,
            )
        ) as tier:
            yield tier

    def regions(self, tier: Tier, key: PageKey) -> dict[str, int]:
        return {f"part {i}": self.raw.length(name) for i, name in enumerate(self.raw.names(key))}

    def flip_bit(self, tier: Tier, key: PageKey, region: str, byte: int, bit: int) -> None:
        self.raw.flip(self.raw.names(key)[int(region.removeprefix("part "))], byte, bit)

    def pass_time(self, tier: Tier, clock: FakeClock, seconds: float) -> None:
        clock.advance(seconds)
        self.raw.pass_time(seconds)
