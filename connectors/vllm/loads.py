"""Loads of the scheduler's half: promises vLLM only what is there, and plans its copies.

    lookup --> lease --> fetched into host slots --> promised to vLLM --> blocks allocated --> copied --> run
      "ask again" while a shared tier is asked        exact: what is promised is pinned in host memory
      and while pages are on their way

So a tier that fails, is slow, or lost a page makes the promise shorter and never breaks it: vLLM's own recovery from
failed loads is needed only if the last copy fails, in memory. While a request is answered "ask again" it holds no
engine block, and others run; all waiting together is bounded (`patience_s`), after which it is computed.

The scheduler's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from connectors.vllm.config import ConnectorConfig
from connectors.vllm.layout import EngineLayout
from connectors.vllm.messages import LoadJob, PageCopies
from connectors.vllm.requests import Requests, Tracked
from kvstore.base import CutReason, KVStore, LeaseState, LoadLease

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

NO_LEASE = 0  # the planner counts from 1
MAX_LEASED_FRACTION = 0.5  # of the host slots, for pages on their way to waiting requests
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0  # after a copy failed; doubled as long as they go on failing
COMPUTING_POLL_S = 0.005  # vLLM asks a thousand times a second, and computing takes longer
MAX_SALTS = 4096  # that are told apart; they come from outside
LONG_BLOCK = 64  # tokens; computing so many on a CPU takes longer than the two steps of a load aside
COUNTERS = (
    "compute_waits",
    "compute_wait_seconds",
    "load_requests",
    "loaded_tokens",
    "short_loads",
    "load_failures",
    "asked_again",
    "rest_seconds",
)


class SchedulerLoads:
    """Loads of one engine.

    counters:  those of COUNTERS, and "hit_tokens.TIER".
    is_beside: workers can copy beside the forward.
    """

    def __init__(
        self,
        store: KVStore,
        engine: EngineLayout,
        config: ConnectorConfig,
        requests: Requests,
        counters: dict[str, float],
        now: Callable[[], float],
        is_beside: bool = False,
    ) -> None:
        self.scheduled: Collection[str] = ()  # requests in the last step
        self._is_beside = is_beside
        self._is_trusted = False  # the last load of these slabs was copied well
        self._pause_s = 0.0
        self._paused_until = 0.0
        self._store = store
        self._engine = engine
        self._block_size = engine.layout.block_size
        self._config = config
        self._requests = requests
        self._counters = counters
        self._now = now
        self._lookup_patience_s = config.store.store.lookup_deadline_s
        self._patience_s = self._lookup_patience_s + config.store.store.load_deadline_s
        self._max_leased = 1
        self._leased = 0
        self._under_way: dict[int, tuple[Tracked, LoadLease]] = {}
        self._coming: dict[bytes, int] = {}  # blocks that are being copied aside, and the lease of the first to do so
        self._keys: dict[int, list[bytes]] = {}  # of those blocks, by lease: the request may have others by the end
        self._jobs: list[LoadJob] = []
        self._lost: dict[str, int] = {}  # the greatest loss of what was loaded, by vLLM's cache salt; "": of all others
        self._asking: Tracked | None = None  # one that was answered "ask again" since the last jobs were taken

    def allow(self, num_slots: int) -> None:
        """There are other slabs now, of so many slots; requests that wait for pages may hold a part of them."""
        self._is_trusted = False
        self._max_leased = max(1, int(MAX_LEASED_FRACTION * num_slots))

    def matched(self, tracked: Tracked, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens after the first `num_computed` can be loaded; None means ask again."""
        if not self._requests.extend(tracked):
            self.let_go(tracked)
        tracked.is_mixed = tracked.is_mixed or (num_computed > 0 and tracked.store.loss < self._loss_in_cache(tracked))
        if tracked.is_mixed or self._now() < self._paused_until:
            self.let_go(tracked)
            return 0, False
        first = num_computed // self._block_size
        if self._is_coming(tracked, first) and not self._is_late(tracked):
            self.let_go(tracked)
            self._ask_again(tracked)
            return None, False
        if tracked.lease is not None and first != tracked.first:
            self.let_go(tracked)  # vLLM's own cache has more or less of it by now
        if tracked.lease is None:
            lease = self._lease(tracked, first)
            if not isinstance(lease, LoadLease):
                return lease, False
            tracked.lease, tracked.first = lease, first
        status = self._store.poll(tracked.lease)
        if status.state is LeaseState.WAITING and not self._is_late(tracked):
            self._ask_again(tracked)
            return None, False
        num_ready = min(status.num_blocks, tracked.most)
        tracked.is_aside = self._goes_aside(tracked, num_ready)
        num_blocks = num_ready if tracked.is_aside else min(num_ready, self._before_last(tracked))
        tokens = num_blocks * self._block_size - num_computed
        if tokens <= 0 or tokens < self._config.fields.min_load_tokens:
            self.let_go(tracked)
            return 0, False
        if num_ready < tracked.lease.num_blocks:
            self._counters["short_loads"] += 1
        tracked.promised = num_blocks
        return tokens, tracked.is_aside

    def allocated(self, tracked: Tracked, blocks: Sequence[Sequence[Any]], num_external: int) -> None:
        """vLLM has blocks for the request, of which `num_external` tokens are to be loaded.

        blocks: vLLM's blocks per one of its groups, from the start of the prompt.
        """
        if tracked.lease is None or tracked.is_loading:
            return
        tracked.asked_at = None
        if num_external == 0:
            self.let_go(tracked)  # vLLM decided otherwise (another connector was longer, say)
            return
        if tracked.store.loss:
            self._note_loss(tracked)
        lease = tracked.lease
        end = tracked.first + num_external // self._block_size
        copies, is_whole = self._copies(lease, blocks, tracked.first, end)
        tracked.by_tier = lease.by_tier
        tracked.is_loading = True
        tracked.lease = None
        self._under_way[lease.id] = (tracked, lease)
        if tracked.is_aside:
            self._keys[lease.id] = list(tracked.store.keys[tracked.first : end])
            for key in self._keys[lease.id]:
                self._coming.setdefault(key, lease.id)
        self._jobs.append(
            LoadJob(
                lease.id,
                tracked.engine.request_id,
                copies,
                tracked.is_aside,
                is_bad=not is_whole or end != tracked.promised,
            )
        )
        self._counters["load_requests"] += 1

    def refuse(self, name: str, tracked: Tracked | None, blocks: Sequence[Sequence[Any]]) -> None:
        """Report the load that vLLM counts on as failed, so that it computes."""
        first = tracked.first if tracked is not None else 0
        is_aside = tracked is None or tracked.is_aside
        if tracked is not None:
            tracked.most = first
            self.let_go(tracked)
        ids = tuple(block.block_id for row in blocks for block in row[first:] if not block.is_null)
        part = PageCopies(0, (-1,) * len(ids), ids)
        self._jobs.append(LoadJob(NO_LEASE, name, (part,), is_aside, is_bad=True))

    def take_jobs(self) -> list[LoadJob]:
        """The copies for this step."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def wait(self, timeout_s: float) -> None:
        """Wait until a request that was answered "ask again" in this step may be answered; a step with nothing to do.

        vLLM would ask again as fast as it can, and hold the interpreter that the store's lanes need to answer.
        """
        asking, self._asking = self._asking, None
        if asking is None or timeout_s <= 0 or self._under_way:
            return
        began = self._now()
        if asking.lease is not None:
            self._store.wait(asking.lease, timeout_s)
        else:
            self._store.wait_lookup(asking.store, timeout_s)
        self._counters["rest_seconds"] += self._now() - began

    def has(self, lease_id: int) -> bool:
        """True while a load is being copied; of all that are refused, always."""
        return lease_id in self._under_way or lease_id == NO_LEASE

    def failed(self, lease_id: int, error: str) -> bool:
        """A rank could not copy: this request is not offered the same blocks again, or it could go round for ever.

        Nor is any other for a while: what failed in memory is likely to fail again, and then a request starts anew.
        Returns True if it failed inside a step, so that others may have computed with what is missing.
        """
        self._is_trusted = False
        self._pause_s = min(MAX_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._paused_until = self._now() + self._pause_s
        if lease_id == NO_LEASE:
            return True  # a refused one, whichever it was
        tracked, lease = self._under_way[lease_id]
        tracked.most = min(tracked.most, tracked.first)
        self._counters["load_failures"] += 1
        log.warning(
            "kvstore: loading %d blocks for request %s failed (%s); they are computed",
            lease.num_blocks - tracked.first,
            tracked.engine.request_id,
            error or "see the worker's log",
        )
        return not tracked.is_aside

    def ended(self, lease_id: int, is_good: bool) -> None:
        """Every rank has copied a load, or failed to."""
        if lease_id == NO_LEASE:
            return
        self._is_trusted = is_good
        self._pause_s = 0.0 if is_good else self._pause_s
        tracked, lease = self._under_way.pop(lease_id)
        for key in self._keys.pop(lease_id, ()):
            if self._coming.get(key) == lease_id:
                del self._coming[key]
        tracked.is_loading = False
        self._leased -= len(lease.pages)
        if not is_good:
            self._store.release(lease)
            return
        self._store.complete(lease)
        num_tokens = (tracked.promised - tracked.first) * self._block_size
        self._counters["loaded_tokens"] += num_tokens
        for tier, count in self.sources(tracked, num_tokens).items():
            name = f"hit_tokens.{tier}"
            self._counters[name] = self._counters.get(name, 0.0) + count

    def sources(self, tracked: Tracked, num_tokens: int) -> dict[str, int]:
        """The origin of the tokens that are loaded for the request, by tier."""
        left, tokens = num_tokens, {}
        for tier, num_blocks in sorted(tracked.by_tier.items()):
            tokens[tier] = min(left, num_blocks * self._block_size)
            left -= tokens[tier]
        return {tier: count for tier, count in tokens.items() if count}

    def let_go(self, tracked: Tracked) -> None:
        """Give back what the request has leased and vLLM was not told to copy."""
        if tracked.lease is not None:
            self._store.release(tracked.lease)
            self._leased -= len(tracked.lease.pages)
            tracked.lease = None

    # ---- private ----------------------------------------------------------------------------------------------

    def _is_coming(self, tracked: Tracked, first: int) -> bool:
        """Whether most of what the request could load is just being copied for another one.

        vLLM shares the blocks of a load only once it has ended. So of many requests with a common head that come at
        once, one loads it, and the others take it from vLLM's own cache, without a copy or blocks of their own.
        """
        if self._config.fields.without_prefix_caching:
            return False
        num_blocks = self._before_last(tracked)
        half = first + (num_blocks - first + 1) // 2
        keys = tracked.store.keys
        return first < half <= len(keys) and keys[half - 1] in self._coming

    def _loss_in_cache(self, tracked: Tracked) -> int:
        """The most that blocks of vLLM's own cache may have lost, which names them by salt and tokens only."""
        return max(self._lost.get(_salt(tracked), 0), self._lost.get("", 0))

    def _note_loss(self, tracked: Tracked) -> None:
        """Blocks that may have lost something come into vLLM's own cache, and what is computed after them."""
        salt = _salt(tracked)
        if salt not in self._lost and len(self._lost) >= MAX_SALTS:
            salt = ""
        self._lost[salt] = max(self._lost.get(salt, 0), tracked.store.loss)

    def _before_last(self, tracked: Tracked) -> int:
        """Whole blocks before the last token, which is always computed.

        vLLM computes that token alone also where the block that it ends was loaded aside: it takes one token back when
        the load has ended. After a load in the step itself it cannot, so there the block is computed.
        """
        return int(tracked.engine.num_tokens - 1) // self._block_size

    def _goes_aside(self, tracked: Tracked, num_blocks: int) -> bool:
        """Whether a load of the first `num_blocks` is asynchronous.

        Beside the forward is faster by two steps and by the copy. But others in that forward wait with it, and vLLM
        recovers from its failure only if nobody shares its blocks: so it is for one request of an idle engine, and
        after copies have worked. Not for a long last block, whose computing would cost more than two steps.
        """
        if self._config.fields.load != "auto":
            return self._config.fields.load == "async"
        if num_blocks > self._before_last(tracked) and self._block_size >= LONG_BLOCK:
            return True
        if not (self._is_beside and self._is_trusted) or any(not job.is_async for job in self._jobs):
            return True
        return any(self._requests.get(name) is not None for name in self.scheduled)

    def _lease(self, tracked: Tracked, first: int) -> LoadLease | int | None:
        """A lease on what is worth loading; 0 if nothing is, None to ask again."""
        if first >= self._before_last(tracked):
            return 0  # vLLM has all there can be, but for a last block: computing that is one step, loading it is more
        if self._now() < tracked.look_at:
            return None
        tracked.store.held = first
        match = self._store.lookup(tracked.store)
        self._counters["compute_wait_seconds"] += match.compute_wait_s
        if match.cut is CutReason.COMPUTING:
            if not tracked.look_at:
                self._counters["compute_waits"] += 1
            tracked.look_at, tracked.asked_at = self._now() + COMPUTING_POLL_S, None
            return None  # the store ends that in good time
        if match.pending and not self._is_late(tracked, self._lookup_patience_s):
            self._ask_again(tracked)
            return None
        end = min(match.num_blocks, tracked.most)
        if not self._goes_aside(tracked, end):
            end = min(end, self._before_last(tracked))
        if end <= first or (end - first) * self._block_size < self._config.fields.min_load_tokens:
            return 0
        groups = len(self._engine.layout.groups)
        if self._leased and self._leased + (end - first) * groups > self._max_leased:
            if self._is_late(tracked):
                return 0
            self._ask_again(tracked)
            return None
        lease = self._store.prepare_load(tracked.store, end, first=first)
        if lease.num_blocks <= first:
            self._store.release(lease)
            return 0
        self._leased += len(lease.pages)
        return lease

    def _ask_again(self, tracked: Tracked) -> None:
        if tracked.asked_at is None:
            tracked.asked_at = self._now()
        self._asking = tracked
        self._counters["asked_again"] += 1

    def _is_late(self, tracked: Tracked, patience_s: float | None = None) -> bool:
        patience_s = self._patience_s if patience_s is None else patience_s
        return tracked.asked_at is not None and self._now() - tracked.asked_at > patience_s

    def _copies(
        self, lease: LoadLease, blocks: Sequence[Sequence[Any]], first: int, end: int
    ) -> tuple[tuple[PageCopies, ...], bool]:
        """The copies of a load, and whether every block that vLLM will read gets its page."""
        pages = lease.pages.at(lease.pages.blocks < end)
        copies: list[PageCopies] = []
        is_whole = True
        for group, engine_group in enumerate(self._engine.group_ids):
            slots: list[int] = []
            ids: list[int] = []
            row = blocks[engine_group]
            members = pages.at(pages.groups == group)
            slot_of = np.full(end, -1, np.int64)
            slot_of[members.blocks] = members.slots
            for block, slot in zip(row[first:end], slot_of[first:].tolist(), strict=True):
                if not block.is_null:  # else outside of the window
                    slots.append(slot)
                    ids.append(block.block_id)
            is_whole &= -1 not in slots
            if slots:
                copies.append(PageCopies(group, tuple(slots), tuple(ids)))
        return tuple(copies), is_whole


def _salt(tracked: Tracked) -> str:
    """A name of vLLM's cache salt, never that of all others; without one, that of requests without one."""
    return f"={getattr(tracked.engine, 'cache_salt', None) or ''}"
