"""The Redis tier by name: its settings, how it is opened, and what its server says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kvstore.config.secret import SecretUrl
from kvstore.config.section import Section
from kvstore.config.values import CODEC, AdmitByUse, Bytes, Codec, Count, OrNone, PlainWord, Seconds
from kvstore.tiers.kind import Asked, TierContext, TierKind, TierTraits
from kvstore.tiers.redis.url import parse_redis_url
from kvstore.units import MiB, format_bytes

if TYPE_CHECKING:
    from kvstore.tiers.base import Tier

PAGE_BYTES = 2 * MiB  # what a page is taken to have where a server is looked at before any layout is known


class RedisConfig(Section):
    """A Redis server that machines share."""

    url: Annotated[SecretUrl | None, OrNone] = Field(
        default=None,
        description="redis, rediss (TLS), unix, redis+sentinel or redis+cluster URL; its password is never printed.",
    )
    ttl_s: Seconds = Field(default=86400.0, gt=0, description="A page unused for this long expires on the server.")
    connections: Count = Field(
        default=3, ge=1, le=64, description="Connections, each with one page under way; 2 to 4 are enough."
    )
    timeout_s: Seconds = Field(default=1.0, gt=0, le=600, description="Longest time for one batch of reads or writes.")
    connect_timeout_s: Seconds = Field(default=0.5, gt=0, le=600, description="Longest time for making a connection.")
    idle_max_s: Seconds = Field(
        default=180.0,
        ge=0,
        description="A connection idle for longer is made anew (NAT forgets after 4 to 6 minutes); 0: never.",
    )
    prefix: PlainWord = Field(default="kv:", description="What every key on the server starts with.")
    capacity_bytes: Annotated[Bytes | None, OrNone] = Field(
        default=None,
        ge=4096,
        description="Most a namespace keeps on the server, all its writers together; none leaves it to maxmemory.",
    )
    admit: AdmitByUse = Field(
        default="always", description="Which saved pages are written: all, or only from their second use on."
    )
    codec: Codec = CODEC

    @property
    def workers(self) -> int:
        """One thread for each connection."""
        return self.connections


def _open(section: RedisConfig, context: TierContext) -> Tier:
    from kvstore.codecs.coder import PageCoder
    from kvstore.tiers.redis.bound import BoundedRedis
    from kvstore.tiers.redis.tier import RedisTier

    assert section.url is not None
    tier = RedisTier(
        section.url.reveal(),
        prefix=section.prefix + context.place,  # so that what a namespace has on a server can be found and bounded
        slot_bytes=context.layout.slot_bytes,
        ttl_s=section.ttl_s,
        connections=section.connections,
        connect_timeout_s=section.connect_timeout_s,
        idle_max_s=section.idle_max_s,
        acl_pattern=f"{section.prefix}*",
        coder=PageCoder(section.codec, context.layout),
    )
    if section.capacity_bytes is None:
        return tier
    return BoundedRedis(tier, section.capacity_bytes // context.layout.slot_bytes, ttl_s=section.ttl_s)


def _traits(section: RedisConfig) -> TierTraits:
    return TierTraits(
        is_indexed=False,
        is_shared=True,
        has_capacity=False,
        can_claim=section.admit == "always",  # else what is computed may never be there
    )


def _ask(section: RedisConfig) -> Asked:
    from kvstore.tiers.redis.advice import advise
    from kvstore.tiers.redis.info import ask_servers

    assert section.url is not None
    servers = ask_servers(section.url.reveal(), timeout_s=max(section.connect_timeout_s, section.timeout_s))
    info, others = servers[0], len(servers) - 1
    limit = (
        ""
        if info.maxmemory_bytes is None
        else f", maxmemory {format_bytes(info.maxmemory_bytes) if info.maxmemory_bytes else 'none'}"
    )
    policy = f", maxmemory-policy {info.policy}" if info.policy else ", policy unknown (its account may not ask)"
    text = f"version {info.version or 'unknown'}{limit}{policy}" + (f", and {others} more" if others else "")
    lines = [
        one.line
        for server in servers
        for one in advise(server, page_bytes=PAGE_BYTES, is_bounded=section.capacity_bytes is not None)
        if one.state == "bad"
    ]
    return Asked(text, f"redis.url {section.url}: " + "; ".join(lines) if lines else "")


def _secrets(section: RedisConfig) -> Iterable[str]:
    if section.url is None:
        return []
    target = parse_redis_url(section.url.reveal())
    return [word for word in (target.password, target.sentinel_password) if word]


KIND = TierKind(
    name="redis",
    section=RedisConfig,
    open=_open,
    switch="url",
    traits=_traits,
    capacity="capacity_bytes",
    address="url",
    ask=_ask,
    secrets=_secrets,
    medium="network",
    color="#008a63",
    refuses_resize="redis evicts by itself: set maxmemory there",
)
