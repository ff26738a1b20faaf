"""Wiring: from a configuration to a running store. The only module that names concrete tiers and policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import uuid4

from eviction.registry import make_policy
from kvstore.config.sections import BreakerConfig, Config, RedisConfig
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from kvstore.move.breaker import Breaker
from kvstore.move.lane import Lane
from kvstore.move.rows import RowMover
from kvstore.plan.lower_tier import TierPlan
from kvstore.plan.planner import Planner
from kvstore.plan.settings import PlanSettings
from kvstore.store import LocalStore
from kvstore.tiers.base import Tier
from kvstore.tiers.disk.tier import DiskTier
from kvstore.tiers.host import HostSlab
from kvstore.tiers.redis.bound import BoundedRedis
from kvstore.tiers.redis.tier import RedisTier
from kvstore.units import format_bytes
from radix.namespace import Namespace

MAX_QUEUE = 8192  # batches that may wait in a lane; a prompt of 128K tokens in blocks of 16 makes 1024
NAMESPACE_DIGITS = 16  # of the namespace's root hash, before the keys of its pages on a shared server
HASH_BYTES = {"sha256": 32, "xxh3_128": 16}


def open_store(
    config: Config, layout: Layout, namespace: Namespace, *, shared_name: str | None = None, is_guarded: bool = False
) -> LocalStore:
    """Open a store with the tiers that `config` turns on; what the disk holds is known when this returns.

    shared_name: put the slab into memory that other processes can map (`LocalStore.slab_handle`), under this name.
    is_guarded:  those can only read it.

    Raises ConfigError if something cannot be had (memory, disk space, a URL), LayoutMismatch if the directory holds
    pages of another geometry. A Redis server that does not answer is no error: its tier is down until it does.
    """
    _check_namespace(config, layout, namespace)
    num_slots = config.host.capacity_bytes // layout.slot_bytes
    if num_slots < 1:
        raise ConfigError(
            f"host.capacity_bytes is {format_bytes(config.host.capacity_bytes)}, less than one page of this model "
            f"({format_bytes(layout.slot_bytes)}); give at least {format_bytes(16 * layout.slot_bytes)}"
        )
    slab = HostSlab(
        num_slots, layout.slot_bytes, shared_name=shared_name, huge_pages=config.host.huge_pages, is_guarded=is_guarded
    )
    opened: list[Tier] = []
    try:
        plans: list[TierPlan] = []
        lanes: list[Lane] = []
        for tier, plan, timeout_s in _lower_tiers(config, layout, num_slots, namespace):
            opened.append(tier)
            plans.append(plan)
            lanes.append(
                Lane(
                    tier,
                    slab.view,
                    workers=plan.workers,
                    breaker=_breaker(config.breaker),
                    timeout_s=timeout_s,
                    max_queue=MAX_QUEUE,
                )
            )
        planner = Planner(
            layout,
            _settings(config, num_slots),
            make_policy(config.host.policy, config.host.ttl_s or None),
            plans,
        )
        for tier in opened:
            planner.restore(tier.name, [(page.key, page.meta) for page in tier.scan()])
        return LocalStore(layout, namespace, planner, slab, lanes)
    except BaseException:
        for tier in opened:
            tier.close()
        slab.close()
        raise


def open_rows(config: Config, layout: Layout, memory: memoryview, row_bytes: int) -> RowMover:
    """The lower tiers that `config` turns on, over rows of memory that an engine owns; no planner, no host tier.

    memory: flat and writable; rows of `row_bytes`, at most `layout.slot_bytes`. Raises what `open_store` raises.
    """
    opened: list[Tier] = []
    try:
        parts = []
        for part in _lower_tiers(config, layout, memory.nbytes // row_bytes):
            opened.append(part[0])
            parts.append(part)

        def make_lanes(slot_view: Callable[[int], memoryview]) -> list[Lane]:
            return [
                Lane(
                    tier,
                    slot_view,
                    workers=plan.workers,
                    breaker=_breaker(config.breaker),
                    timeout_s=timeout_s,
                    max_queue=MAX_QUEUE,
                )
                for tier, plan, timeout_s in parts
            ]

        return RowMover(make_lanes, memory, row_bytes)
    except BaseException:
        for tier in opened:
            tier.close()
        raise


def attach_tier(store: LocalStore, config: Config, name: str) -> None:
    """Open the tier `name` as `config` has it and give it to a store that is in use.

    Raises ConfigError if the configuration has no such tier, or as `open_store` does.
    """
    num_slots = store.slab_array.nbytes // store.layout.slot_bytes
    sections = {"disk": ("disk", "redis"), "redis": ("redis", "disk")}
    if name not in sections:
        raise ConfigError(f"there is no kind of tier {name!r}; there are {', '.join(sections)}")
    _, other = sections[name]
    off = {"path": None} if other == "disk" else {"url": None}
    only = config.model_copy(update={other: getattr(config, other).model_copy(update=off)})
    for tier, plan, timeout_s in _lower_tiers(only, store.layout, num_slots, store.namespace):
        lane = Lane(
            tier,
            store.slot_view,
            workers=plan.workers,
            breaker=_breaker(config.breaker),
            timeout_s=timeout_s,
            max_queue=MAX_QUEUE,
        )
        try:
            store.admin.attach_tier(lane, plan)
        except BaseException:
            tier.close()
            raise
        return
    raise ConfigError(f"{name}.{'path' if name == 'disk' else 'url'} is none; without it there is no tier to attach")


def _lower_tiers(
    config: Config, layout: Layout, num_slots: int, namespace: Namespace | None = None
) -> Iterator[tuple[Tier, TierPlan, float]]:
    window = max(config.store.lane_batch_pages, int(config.store.max_dirty_fraction * num_slots))
    disk, redis = config.disk, config.redis
    if disk.path is not None:
        tier: Tier = DiskTier.open(
            disk.path,
            layout.fingerprint,
            layout.slot_bytes,
            disk.capacity_bytes,
            direct=disk.direct_io,
            shared=disk.shared,
        )
        plan = TierPlan(
            name=tier.name,
            capacity_pages=tier.capacity_pages,
            policy=make_policy(disk.policy, disk.ttl_s or None),
            is_indexed=True,
            is_shared=disk.shared,
            admit=disk.admit,
            ttl_s=disk.ttl_s,
            window_pages=min(window, 4 * disk.workers * config.store.lane_batch_pages),
            workers=disk.workers,
        )
        yield tier, plan, disk.timeout_s
    if redis.url is not None:
        tier = _redis_tier(redis, layout, "" if namespace is None else f"{namespace.root().hex()[:NAMESPACE_DIGITS]}:")
        plan = TierPlan(
            name=tier.name,
            capacity_pages=None,
            policy=None,
            is_indexed=False,
            is_shared=True,
            admit=redis.admit,
            ttl_s=redis.ttl_s,
            window_pages=min(window, 4 * redis.connections * config.store.lane_batch_pages),
            workers=redis.connections,
            can_claim=redis.admit == "always",  # else what is computed may never be there
            can_clear=namespace is not None,  # the prefix of its keys is the namespace's own
        )
        yield tier, plan, redis.timeout_s


def _redis_tier(redis: RedisConfig, layout: Layout, place: str) -> Tier:
    """place: goes before the page keys, so that what a namespace has on a server can be found and bounded."""
    assert redis.url is not None
    tier = RedisTier(
        redis.url.reveal(),
        prefix=redis.prefix + place,
        slot_bytes=layout.slot_bytes,
        ttl_s=redis.ttl_s,
        connections=redis.connections,
        connect_timeout_s=redis.connect_timeout_s,
        idle_max_s=redis.idle_max_s,
        acl_pattern=f"{redis.prefix}*",
        codec=redis.codec,
    )
    if redis.capacity_bytes is None:
        return tier
    return BoundedRedis(tier, redis.capacity_bytes // layout.slot_bytes, ttl_s=redis.ttl_s)


def _settings(config: Config, num_slots: int) -> PlanSettings:
    store = config.store
    return PlanSettings(
        num_slots=num_slots,
        min_hit_blocks=store.min_hit_blocks,
        load_or_recompute=store.load_or_recompute,
        lookup_deadline_s=store.lookup_deadline_s,
        load_deadline_s=store.load_deadline_s,
        batch_pages=store.lane_batch_pages,
        max_prefetch_slots=int(store.max_prefetch_slots_fraction * num_slots),
        touch_interval_s=store.touch_interval_s,
        hash_bytes=HASH_BYTES[store.hash],
        compare_tokens=store.hash != "sha256",
        compute_wait_s=store.compute_wait_s,
        max_pinned_fraction=store.max_pinned_fraction,
        pin_max_s=store.pin_max_s,
        claimer=uuid4().bytes,
    )


def _breaker(config: BreakerConfig) -> Breaker:
    return Breaker(config.failures_to_open, config.probe_after_s, config.probe_max_s)


def _check_namespace(config: Config, layout: Layout, namespace: Namespace) -> None:
    for field, ours, theirs in (
        ("block_size", layout.block_size, namespace.block_size),
        ("layout", layout.fingerprint, namespace.layout),
        ("hash", config.store.hash, namespace.hash),
    ):
        if ours != theirs:
            raise ConfigError(f"namespace.{field} is {theirs!r}; the store was configured with {ours!r}")
