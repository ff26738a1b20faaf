"""Wiring: from a configuration to a running store. It names no tier: which there are is the registry's to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kvstore.codecs.loss import Loss, loss_of_codec
from kvstore.errors import ConfigError, KVStoreError
from kvstore.hints.limits import HintLimits
from kvstore.layout import Layout
from kvstore.learned import Learned
from kvstore.move.breaker import Breaker
from kvstore.move.exchange import Exchange
from kvstore.move.lane import Lane
from kvstore.move.recorder import TrafficRecorder
from kvstore.move.rows import RowMover
from kvstore.plan.endings import one_word
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings, SpeculationSettings
from kvstore.plan.tier_plan import TierPlan
from kvstore.policies import make_policy
from kvstore.store import LocalStore
from kvstore.tiers import registry
from kvstore.tiers.base import Selective, Sweepable, Tier
from kvstore.tiers.checked import CheckedTier
from kvstore.tiers.host import HostSlab
from kvstore.tiers.kind import TierContext, TierKind
from kvstore.units import format_bytes
from radix.namespace import Namespace

if TYPE_CHECKING:  # a store is wired from a configuration; reading one costs more than all else that is imported here
    from kvstore.config.sections import BreakerConfig, Config

MAX_QUEUE = 8192  # batches that may wait in a lane; a prompt of 128K tokens in blocks of 16 makes 1024
NAMESPACE_DIGITS = 16  # of the namespace's root hash, before the keys of its pages on a shared server
HASH_BYTES = {"sha256": 32, "xxh3_128": 16}


def open_store(
    config: Config, layout: Layout, namespace: Namespace, *, shared_name: str | None = None, is_guarded: bool = False
) -> LocalStore:
    """Open a store with the tiers that `config` turns on; what the disk holds is known when this returns.

    shared_name: put the slab into memory that other processes can map (`store.slots.slabs`), under this name.
    is_guarded:  those can only read it.

    Raises ConfigError if something cannot be had (memory, disk space, a URL), LayoutMismatch if the directory holds
    pages of another geometry. A Redis server that does not answer is no error: its tier is down until it does.
    """
    _check_namespace(config, layout, namespace)
    loss = loss_of_tiers(config)
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
        for lower in _lower_tiers(config, layout, num_slots, namespace):
            opened.append(lower.tier)
            plans.append(lower.plan)
            lanes.append(lower.lane(config, slab.view))
        planner = Planner(
            layout,
            _settings(config, num_slots),
            make_policy(config.host.policy, config.host.ttl_s or None),
            plans,
        )
        for tier in opened:
            planner.restore(tier.name, [(page.key, page.meta) for page in tier.scan()])
        learned = _learned(config, layout, namespace)
        if learned is not None:
            for name, policy in planner.books.policies():
                learned.restore(name, policy)
        record = config.store.record
        recorder = None if record is None else TrafficRecorder(record, layout.block_size, config.store.record_bytes)
        store = LocalStore(layout, namespace, planner, slab, lanes, recorder=recorder, learned=learned)
        store.loss = loss
        return store
    except BaseException:
        for tier in opened:
            tier.close()
        slab.close()
        raise


def open_rows(config: Config, layout: Layout, memory: memoryview, row_bytes: int) -> RowMover:
    """The lower tiers that `config` turns on, over rows of memory that an engine owns; no planner, no host tier.

    memory: flat and writable; rows of `row_bytes`, at most `layout.slot_bytes`. Raises what `open_store` raises.
    """
    opened: list[OpenedTier] = []
    try:
        opened.extend(_lower_tiers(config, layout, memory.nbytes // row_bytes))

        def make_lanes(slot_view: Callable[[int], memoryview]) -> list[Lane]:
            return [lower.lane(config, slot_view) for lower in opened]

        return RowMover(make_lanes, memory, row_bytes)
    except BaseException:
        for lower in opened:
            lower.tier.close()
        raise


def open_exchange(
    config: Config, layout: Layout, namespace: Namespace, *, expires_at: Callable[[str], float]
) -> Exchange:
    """The lower tiers that `config` turns on, for an engine that waits in its own threads; no planner, no host tier.

    expires_at: when what is written to a tier now leaves it, in Unix seconds. Raises what `open_store` raises.
    """
    opened: list[OpenedTier] = []
    try:
        opened.extend(_lower_tiers(config, layout, config.store.lane_batch_pages, namespace))

        def make_lanes(slot_view: Callable[[int], memoryview]) -> list[Lane]:
            return [lower.lane(config, slot_view) for lower in opened]

        return Exchange(make_lanes, layout.slot_bytes, config.store.lane_batch_pages, expires_at)
    except BaseException:
        for lower in opened:
            lower.tier.close()
        raise


def attach_tier(store: LocalStore, config: Config, name: str) -> None:
    """Open the tier `name` as `config` has it and give it to a store that is in use.

    Raises ConfigError if the configuration has no such tier, or as `open_store` does.
    """
    kind, section = registry.kind_of(name), config.tier(name)
    if not kind.is_on(section):
        raise ConfigError(f"{name}.{kind.switch} is none; without it there is no tier to attach")
    loss = loss_of_codec(kind.value(section, "codec", "exact"))
    if loss > store.loss:
        raise ConfigError(
            f"{name}.codec is {loss.word!r}, but this store names its blocks for readers that take {store.loss.word} "
            f"pages; attach it with another codec, or start with it"
        )
    num_slots = store.slots.buffer.nbytes // store.layout.slot_bytes
    lower = _open_tier(kind, section, config, store.layout, num_slots, store.namespace)
    try:
        if lower.plan.policy is not None:
            store.relearn(name, lower.plan.policy)
        store.admin.attach_tier(lower.lane(config, store.slots.view), lower.plan)
    except BaseException:
        lower.tier.close()
        raise


@dataclass(frozen=True, slots=True)
class OpenedTier:
    """A tier that was opened, and what the planner is told of it."""

    tier: Tier
    plan: TierPlan
    timeout_s: float

    def lane(self, config: Config, slot_view: Callable[[int], memoryview]) -> Lane:
        """Return the lane that carries its pages."""
        return Lane(
            self.tier,
            slot_view,
            workers=self.plan.workers,
            breaker=_breaker(config.breaker),
            timeout_s=self.timeout_s,
            max_queue=MAX_QUEUE,
        )


def _lower_tiers(
    config: Config, layout: Layout, num_slots: int, namespace: Namespace | None = None
) -> Iterator[OpenedTier]:
    for kind, section in config.tiers():
        yield _open_tier(kind, section, config, layout, num_slots, namespace)


def _open_tier(
    kind: TierKind[Any], section: Any, config: Config, layout: Layout, num_slots: int, namespace: Namespace | None
) -> OpenedTier:
    place = "" if namespace is None else f"{namespace.root().hex()[:NAMESPACE_DIGITS]}:"
    try:
        traits = kind.traits(section)
        tier = registry.check_tier(kind, kind.open(section, TierContext(layout, place)))
    except (KVStoreError, OSError, MemoryError):
        raise
    except Exception as error:  # a tier of somebody else's may raise anything
        raise ConfigError(
            f"tier {kind.name} ({registry.origin(kind.name)}) cannot be opened: {type(error).__name__}: {error}"
        ) from error
    workers = kind.value(section, "workers", 1)
    if not traits.is_verified:
        tier = CheckedTier(tier)
    batch_pages = config.store.lane_batch_pages
    window = max(batch_pages, int(config.store.max_dirty_fraction * num_slots))
    ttl_s = kind.value(section, "ttl_s", 0.0)
    plan = TierPlan(
        name=tier.name,
        capacity_pages=tier.capacity_pages if traits.has_capacity else None,
        policy=make_policy(kind.value(section, "policy", "lru"), ttl_s or None) if traits.has_capacity else None,
        is_indexed=traits.is_indexed,
        is_shared=traits.is_shared,
        admit=kind.value(section, "admit", "always"),
        ttl_s=ttl_s,
        window_pages=min(window, 4 * workers * batch_pages),
        workers=workers,
        can_claim=traits.can_claim,
        exclusive=kind.value(section, "exclusive", False),
        max_writes_per_day=kind.value(section, "max_writes_per_day", None) or 0,
        can_clear=namespace is not None and isinstance(tier, Sweepable),  # what has its place is the namespace's own
        has_room_for=tier.has_room_for if isinstance(tier, Selective) else None,
    )
    return OpenedTier(tier, plan, kind.value(section, "timeout_s", 2.0))


def loss_of_tiers(config: Config) -> Loss:
    """The most that any tier of a configuration loses of a page. Raises ConfigError where names cannot tell it."""
    losses = {kind.name: loss_of_codec(kind.value(section, "codec", "exact")) for kind, section in config.tiers()}
    lossy = max(losses, key=lambda name: losses[name], default="")
    if lossy and losses[lossy] and config.store.hash != "sha256":
        raise ConfigError(
            f"{lossy}.codec is {losses[lossy].word!r}: the name of a page tells what may be lost of it, which needs "
            f"store.hash 'sha256', not {config.store.hash!r}"
        )
    return losses[lossy] if lossy else Loss.EXACT


def _learned(config: Config, layout: Layout, namespace: Namespace) -> Learned | None:
    """The place of what policies learn: beside the pages of the first tier that has a directory."""
    homes = [home for kind, section in config.tiers() if (home := kind.home(section)) is not None]
    return Learned(homes[0], namespace.root().hex(), layout.block_size) if homes else None


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
        max_payer_fraction=config.hints.max_tenant_fraction,
        pin_max_s=store.pin_max_s,
        ttl_after={one_word(reason): seconds for reason, seconds in store.ttl_after.items()},
        claimer=uuid4().bytes,
        speculation=_speculation(config, num_slots),
        hints=hint_limits(config),
    )


def hint_limits(config: Config) -> HintLimits:
    """The bounds on hints, as configured."""
    hints = config.hints
    return HintLimits(
        hints.enabled, hints.max_bytes, hints.max_actions, hints.max_tokens, hints.default_ttl_s, hints.max_ttl_s
    )


def _speculation(config: Config, num_slots: int) -> SpeculationSettings | None:
    section = config.speculation
    if section.mode == "off":
        return None
    num_pages = int(section.max_slots_fraction * num_slots)
    return SpeculationSettings(section.mode, num_pages, float(section.bandwidth_bytes), section.max_waste)


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
