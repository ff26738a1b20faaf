"""The scheduler's half: asks the store, promises vLLM only what is there, and plans the copies.

It lives in vLLM's engine core, on the scheduler's thread; the store's lanes move bytes between host memory and the
lower tiers on threads of their own. The way of a request:

    lookup --> lease --> fetched into host slots --> promised to vLLM --> blocks allocated --> copied --> run
      "ask again" while a shared tier is asked        exact: what is promised is pinned in host memory
      and while pages are on their way

So a tier that fails, is slow, or lost a page makes the promise shorter and never breaks it: vLLM's own recovery from
failed loads is needed only if the last copy fails, in memory. While a request is answered "ask again" it holds no
engine block, and others run; all waiting together is bounded (`patience_s`), after which it is computed.

Saves take the opposite way: blocks that a step fills get slots before the step, are held in vLLM's block pool (a
reference, as if another request used them) until every rank has copied them, and are then published. Neither the end
of the request nor a preemption has to wait for it, and the engine never waits for a save.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from connectors.vllm_config import ConnectorConfig
from connectors.vllm_layout import EngineLayout
from connectors.vllm_messages import LoadJob, PageCopies, SaveJob, StepPlan, StepReport
from kvstore.base import KVStore
from kvstore.errors import ConfigError
from kvstore.plan.records import LeaseState, LoadLease, Request, RequestOptions, SaveLease
from kvstore.tiers.host import SlabHandle

log = logging.getLogger(__name__)

NO_LEASE = 0  # the planner counts from 1
NEVER = 1 << 40  # more blocks than any prompt has
MAX_LEASED_FRACTION = 0.5  # of the host slots, for pages on their way to waiting requests


@dataclass(slots=True)
class Tracked:
    """What is remembered of one of vLLM's requests.

    engine:     vLLM's request.
    store:      ours; it grows with the block hashes vLLM makes.
    first:      blocks that vLLM's own cache had at the last question.
    promised:   blocks the request can start from, of the answer that was given.
    asked_at:   when it was first answered "ask again".
    most:       blocks that may be promised; less after a load of this request failed.
    num_saved:  blocks that have been given to a save, or need none.
    num_hashed: vLLM's hashes that are in `store`.
    """

    engine: Any
    store: Request
    most: int
    lease: LoadLease | None = None
    first: int = 0
    promised: int = 0
    asked_at: float | None = None
    is_loading: bool = False
    num_saved: int = 0
    num_hashed: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Saving:
    """A save that ranks are copying: its lease, which of its pages have a block, the blocks held for it."""

    lease: SaveLease
    request: str
    filled: list[bool]
    held: list[Any]
    hashes: list[bytes]
    is_good: bool = True


class SchedulerHalf:
    """Decides for one engine. The scheduler's thread, but for `saved`.

    world:      ranks that report each copy.
    identify:   names what makes a request's KV different and vLLM's hashes do not cover (its adapter's files).
    """

    def __init__(
        self,
        store: KVStore,
        engine: EngineLayout,
        config: ConnectorConfig,
        slab: SlabHandle | None,
        *,
        world: int = 1,
        num_slots: int,
        identify: Callable[[Any], str] = lambda request: "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.counters = dict.fromkeys(COUNTERS, 0.0)
        self._engine = engine
        self._block_size = engine.layout.block_size
        self._config = config
        self.slab = slab
        self._world = world
        self._identify = identify
        self._now = now
        self._patience_s = config.store.store.lookup_deadline_s + config.store.store.load_deadline_s
        self._max_leased = max(1, int(MAX_LEASED_FRACTION * num_slots))
        self._leased = 0
        self._salt = ""
        self._pool: Any = None
        self._tracked: dict[str, Tracked] = {}
        self._loading: dict[int, tuple[Tracked, LoadLease]] = {}
        self._saving: dict[int, Saving] = {}
        self._ranks: dict[int, int] = {}
        self._broken: set[int] = set()
        self._plan = StepPlan()
        self.stored_events: list[tuple[list[bytes], str]] = []

    def bind_pool(self, pool: Any) -> None:
        """Learn vLLM's block pool, in which blocks under a save are held."""
        self._pool = pool

    def new_request(self, request: Any) -> None:
        """Begin with a request; one that this was not called for, or failed for, does not use the store."""
        tenant = self._identify(request)
        if self._salt:
            tenant = f"{tenant}|{self._salt}"
        options = _options(request, tenant)
        store_request = self.store.request_from_hashes([], max(1, request.num_tokens), options)
        self._tracked[request.request_id] = Tracked(request, store_request, most=NEVER)

    # ---- loading ----------------------------------------------------------------------------------------------

    def matched(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens after the first `num_computed` can be loaded; None means ask again."""
        if not self._config.loads:
            return 0, False
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        self._extend(tracked)
        first = num_computed // self._block_size
        if tracked.lease is not None and first != tracked.first:
            self._let_go(tracked)  # vLLM's own cache has more or less of it by now
        if tracked.lease is None:
            lease = self._lease(tracked, first)
            if not isinstance(lease, LoadLease):
                return lease, False
            tracked.lease, tracked.first = lease, first
        status = self.store.poll(tracked.lease)
        if status.state is LeaseState.WAITING and not self._is_late(tracked):
            self._ask_again(tracked)
            return None, False
        num_blocks = min(status.num_blocks, tracked.most)
        tokens = num_blocks * self._block_size - num_computed
        if tokens <= 0 or tokens < self._config.fields.min_load_tokens:
            self._let_go(tracked)
            return 0, False
        if num_blocks < tracked.lease.num_blocks:
            self.counters["short_loads"] += 1
        tracked.promised = num_blocks
        return tokens, self._config.fields.load == "async"

    def allocated(self, request: Any, blocks: Sequence[Sequence[Any]], num_external: int) -> None:
        """vLLM has blocks for the request, of which `num_external` tokens are to be loaded.

        blocks: vLLM's blocks per one of its groups, from the start of the prompt.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.lease is None or tracked.is_loading:
            return
        tracked.asked_at = None
        if num_external == 0:
            self._let_go(tracked)  # vLLM decided otherwise (another connector was longer, say)
            return
        lease = tracked.lease
        end = tracked.first + num_external // self._block_size
        copies, is_whole = self._load_copies(lease, blocks, tracked.first, end)
        tracked.by_tier = lease.by_tier
        tracked.is_loading = True
        tracked.lease = None
        self._loading[lease.id] = (tracked, lease)
        self._plan.loads.append(
            LoadJob(
                lease.id,
                request.request_id,
                copies,
                self._config.fields.load == "async",
                is_bad=not is_whole or end != tracked.promised,
            )
        )
        self.counters["load_requests"] += 1

    def refuse(self, request: Any, blocks: Sequence[Sequence[Any]]) -> None:
        """Report the load that vLLM counts on as failed, so that it computes."""
        tracked = self._tracked.get(request.request_id)
        first = tracked.first if tracked is not None else 0
        if tracked is not None:
            tracked.most = first
            self._let_go(tracked)
        ids = tuple(block.block_id for row in blocks for block in row[first:] if not block.is_null)
        part = PageCopies(0, (-1,) * len(ids), ids)
        is_async = self._config.fields.load == "async"
        self._plan.loads.append(LoadJob(NO_LEASE, request.request_id, (part,), is_async, is_bad=True))

    def hit_sources(self, request: Any, num_tokens: int) -> dict[str, int]:
        """Where the tokens that are loaded for the request come from, by tier."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return {}
        left, tokens = num_tokens, {}
        for tier, num_blocks in sorted(tracked.by_tier.items()):
            tokens[tier] = min(left, num_blocks * self._block_size)
            left -= tokens[tier]
        return {tier: count for tier, count in tokens.items() if count}

    # ---- one step ---------------------------------------------------------------------------------------------

    def plan_step(self, scheduled: Mapping[str, int], block_ids: Callable[[str], Any]) -> StepPlan:
        """The copies of the step that vLLM has just scheduled.

        scheduled: tokens per request. block_ids: vLLM's block ids of a request, per group, or None.
        """
        for name, num_tokens in scheduled.items():
            tracked = self._tracked.get(name)
            if tracked is None or not self._config.saves:
                continue
            try:
                self._plan_save(name, tracked, num_tokens, block_ids)
            except Exception:  # a save that cannot be planned must not keep the loads of this step from the workers
                self.counters["save_failures"] += 1
                log.exception("kvstore: a save of request %s could not be planned", name)
                tracked.num_saved = NEVER
        plan, self._plan = self._plan, StepPlan()
        plan.num_tokens = sum(scheduled.values())
        if plan.loads or plan.saves:
            plan.layout, plan.slab = self._engine.layout.fingerprint, self.slab
        return plan

    def reported(self, report: StepReport) -> None:
        """Book what the ranks have copied."""
        counters = self.counters
        for name in ("loaded_bytes", "load_seconds", "saved_bytes", "save_seconds"):
            counters[name] += getattr(report, name)
        if report.forward_tokens:
            self.store.observe_prefill(report.forward_tokens, report.forward_seconds)
        self._broken |= report.failed
        for lease in report.failed:
            if lease in self._loading:
                self._distrust(*self._loading[lease], report.error)
        for lease, ranks in report.done.items():
            ranks += self._ranks.pop(lease, 0)
            if ranks < self._world:
                self._ranks[lease] = ranks
                continue
            is_good = lease not in self._broken
            self._broken.discard(lease)
            if lease in self._loading:
                self._loaded(lease, is_good)
            elif lease in self._saving:
                self._end_save(self._saving.pop(lease), is_good)

    def saved(self, lease_id: int, ok: bool) -> None:
        """A save of the only rank ended. Any thread; publishes at once what `reported` would at the next step."""
        saving = self._saving.get(lease_id)
        if saving is not None and ok and self._world == 1 and saving.is_good:
            self.store.complete(saving.lease, filled=saving.filled)

    @property
    def is_saving(self) -> bool:
        """True while ranks are copying: vLLM has to go on stepping to hear of it."""
        return bool(self._saving)

    @property
    def is_busy(self) -> bool:
        """True while there are requests."""
        return bool(self._tracked)

    def request_finished(self, request: Any) -> None:
        """The request is over, well or not."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._let_go(tracked)
        status = getattr(getattr(request, "status", None), "name", "")
        self.store.finished(tracked.store, finish_reason=status.removeprefix("FINISHED_").lower())

    def reset(self, salt: str) -> None:
        """Forget everything for this engine: pages stored so far have other names from now on."""
        self._salt = salt
        for tracked in self._tracked.values():
            self._let_go(tracked)
        self._tracked.clear()
        for saving in self._saving.values():
            saving.is_good = False

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left and stop."""
        for tracked in self._tracked.values():
            self._let_go(tracked)
        self.store.close(timeout_s)

    # ---- private ----------------------------------------------------------------------------------------------

    def _extend(self, tracked: Tracked) -> None:
        """Take over the block hashes that vLLM has made since."""
        per_block = self._engine.hashes_per_block
        hashes = tracked.engine.block_hashes
        end = len(hashes) // per_block * per_block
        if end < tracked.num_hashed:  # a streaming session took back its last tokens
            options = tracked.store.options
            tracked.store = self.store.request_from_hashes([], tracked.engine.num_tokens, options)
            tracked.num_saved = min(tracked.num_saved, end // per_block)
            tracked.num_hashed = 0
            self._let_go(tracked)
        if end > tracked.num_hashed or tracked.engine.num_tokens > tracked.store.num_tokens:
            new = [bytes(one) for one in hashes[tracked.num_hashed + per_block - 1 : end : per_block]]
            self.store.extend_hashes(tracked.store, new, tracked.engine.num_tokens)
            tracked.num_hashed = end

    def _lease(self, tracked: Tracked, first: int) -> LoadLease | int | None:
        """A lease on what is worth loading; 0 if nothing is, None to ask again."""
        match = self.store.lookup(tracked.store)
        if match.pending and not self._is_late(tracked, self._config.store.store.lookup_deadline_s):
            self._ask_again(tracked)
            return None
        end = min(match.num_blocks, tracked.most)
        if end <= first or (end - first) * self._block_size < self._config.fields.min_load_tokens:
            return 0
        groups = len(self._engine.layout.groups)
        if self._leased and self._leased + (end - first) * groups > self._max_leased:
            if self._is_late(tracked):
                return 0
            self._ask_again(tracked)
            return None
        lease = self.store.prepare_load(tracked.store, end, first=first)
        if lease.num_blocks <= first:
            self.store.release(lease)
            return 0
        self._leased += len(lease.pages)
        return lease

    def _ask_again(self, tracked: Tracked) -> None:
        if tracked.asked_at is None:
            tracked.asked_at = self._now()
        self.counters["asked_again"] += 1

    def _is_late(self, tracked: Tracked, patience_s: float | None = None) -> bool:
        patience_s = self._patience_s if patience_s is None else patience_s
        return tracked.asked_at is not None and self._now() - tracked.asked_at > patience_s

    def _let_go(self, tracked: Tracked) -> None:
        if tracked.lease is not None:
            self.store.release(tracked.lease)
            self._leased -= len(tracked.lease.pages)
            tracked.lease = None

    def _load_copies(
        self, lease: LoadLease, blocks: Sequence[Sequence[Any]], first: int, end: int
    ) -> tuple[tuple[PageCopies, ...], bool]:
        """The copies of a load, and whether every block that vLLM will read gets its page."""
        slot_of = {(page.group, page.block): page.slot for page in lease.pages}
        copies: list[PageCopies] = []
        is_whole = True
        for group, engine_group in enumerate(self._engine.group_ids):
            slots: list[int] = []
            ids: list[int] = []
            row = blocks[engine_group]
            for index in range(first, end):
                if row[index].is_null:
                    continue  # outside of the window
                slot = slot_of.get((group, index))
                is_whole &= slot is not None
                slots.append(-1 if slot is None else slot)
                ids.append(row[index].block_id)
            if slots:
                copies.append(PageCopies(group, tuple(slots), tuple(ids)))
        return tuple(copies), is_whole

    def _loaded(self, lease_id: int, is_good: bool) -> None:
        tracked, lease = self._loading.pop(lease_id)
        tracked.is_loading = False
        self._leased -= len(lease.pages)
        if is_good:
            self.store.complete(lease)
            self.counters["loaded_tokens"] += (tracked.promised - tracked.first) * self._block_size
        else:
            self.store.release(lease)

    def _distrust(self, tracked: Tracked, lease: LoadLease, error: str) -> None:
        """A load failed: this request is not offered the same blocks again, or it could go round for ever."""
        tracked.most = min(tracked.most, tracked.first)
        self.counters["load_failures"] += 1
        log.warning(
            "kvstore: loading %d blocks for request %s failed (%s); they are computed",
            lease.num_blocks - tracked.first,
            tracked.engine.request_id,
            error or "see the worker's log",
        )

    def _plan_save(self, name: str, tracked: Tracked, num_tokens: int, block_ids: Callable[[str], Any]) -> None:
        request = tracked.engine
        end = (request.num_computed_tokens + num_tokens) // self._block_size
        if self._config.fields.save == "prompt":
            end = min(end, request.num_prompt_tokens // self._block_size)
        end = min(end, len(request.block_hashes) // self._engine.hashes_per_block)
        if end <= tracked.num_saved:
            return
        ids = block_ids(name)
        if ids is None:
            return
        self._extend(tracked)
        first, tracked.num_saved = tracked.num_saved, end
        lease = self.store.prepare_save(tracked.store, first, end - first)
        self.counters["skipped_pages"] += lease.skipped
        if not lease.pages:
            self.store.release(lease)
            return
        copies: dict[int, tuple[list[int], list[int]]] = {}
        filled: list[bool] = []
        for page in lease.pages:
            row = ids[self._engine.group_ids[page.group]]
            block = row[page.block] if page.block < len(row) else 0
            filled.append(block != 0)  # block 0 is vLLM's null block: outside of the window
            if block:
                slots, blocks = copies.setdefault(page.group, ([], []))
                slots.append(page.slot)
                blocks.append(block)
        if not copies or self._pool is None:
            self.store.release(lease)
            return
        held = [self._pool.blocks[block] for _, blocks in copies.values() for block in blocks]
        self._pool.touch(held)
        per_block = self._engine.hashes_per_block
        hashes = [bytes(one) for one in request.block_hashes[per_block - 1 :: per_block][first:end]]
        self._saving[lease.id] = Saving(lease, name, filled, held, hashes)
        self._plan.saves.append(
            SaveJob(lease.id, name, tuple(PageCopies(group, tuple(s), tuple(b)) for group, (s, b) in copies.items()))
        )

    def _end_save(self, saving: Saving, is_good: bool) -> None:
        self._pool.free_blocks(reversed(saving.held))
        if is_good and saving.is_good:
            self.store.complete(saving.lease, filled=saving.filled)
            self.counters["saved_pages"] += sum(saving.filled)
            self.stored_events.append((saving.hashes, saving.request))
        else:
            self.store.release(saving.lease)
            self.counters["save_failures"] += 1


COUNTERS = (
    "load_requests",
    "loaded_tokens",
    "loaded_bytes",
    "load_seconds",
    "short_loads",
    "load_failures",
    "asked_again",
    "saved_pages",
    "saved_bytes",
    "save_seconds",
    "skipped_pages",
    "save_failures",
    "hook_errors",
)


def check_redis(store: KVStore, config: ConnectorConfig, block_size: int) -> None:
    """Ask the Redis tier about a page that nobody has. Raises ConfigError if there is no answer in time."""
    redis = config.store.redis
    wait_s = redis.connect_timeout_s + redis.timeout_s
    nobody = store.request_from_hashes([secrets.token_bytes(32)], block_size + 1)
    until = time.monotonic() + wait_s
    match = store.wait_lookup(nobody, wait_s)
    while match.pending and time.monotonic() < until:
        match = store.wait_lookup(nobody, until - time.monotonic())
    store.finished(nobody)
    errors = store.stats().get("lane_errors", {}).get("redis", {})
    if match.pending or any(errors.values()):
        raise ConfigError(
            f"redis.url: the server does not answer within {wait_s:.1f} s; start it or mend the URL, or set "
            '"require_redis": false in kv_connector_extra_config to start without it'
        )


def _options(request: Any, tenant: str) -> RequestOptions:
    """What vLLM's request says about itself: its priority, and hints under "kvstore" in kv_transfer_params."""
    hints = (getattr(request, "kv_transfer_params", None) or {}).get("kvstore")
    hints = hints if isinstance(hints, Mapping) else {}
    ttl_s = hints.get("ttl_s")
    return RequestOptions(
        tenant=tenant,
        session=str(hints.get("session", "")),
        priority=int(hints.get("priority", 0)),
        ttl_s=float(ttl_s) if ttl_s is not None and float(ttl_s) > 0 else None,
        retain_until=max(0.0, float(hints.get("retain_until", 0.0))),
    )
