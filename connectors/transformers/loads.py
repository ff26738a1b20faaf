"""Lookups, and loads into a fresh cache: what is stored of a prompt, on a boundary that this mode can resume from.

Both go step by step: a generator yields where it would wait and `may_block()` says no, so that one thread can serve
many prompts. Nothing here raises: what cannot be had is computed, and counted.

The hard thing: a load that comes out shorter than it was promised. In mode "exact" it must end on a boundary of the
prefill chunks, and with sliding windows or states the pages for resuming at N are not those for resuming earlier. Such
a lease is given back and another taken at a boundary below; all attempts together keep to one deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from connectors.base import ConnectorCounters, log_failure, resume_blocks, tokens_by_tier
from connectors.transformers.cache import CacheBridge
from kvstore.base import CutReason, KVStore, LeaseState, LeaseStatus, LoadLease, Request, RequestOptions
from kvstore.errors import RequestError

log = logging.getLogger(__name__)

LOAD_ATTEMPTS = 3  # each one ends at a lower boundary than the one before
POLL_DEADLINE_S = 2.0  # of a load that is polled where no deadline was given: the store's own default
PENDING_MAX_S = 60.0  # of tiers, where a lookup is polled: stores answer long before, so this one has lost its way


@dataclass(frozen=True, slots=True)
class Loaded:
    """A cache and how much of the prompt it holds; a plain cold start where num_tokens is 0.

    by_tier: tokens by the tier they came from.
    """

    cache: Any
    num_tokens: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Matched:
    """The tokens that a lookup found to resume from, and how long it waited for another request to compute them.

    branch: tokens whose keys and values are stored, with a state at their end or without.
    """

    num_tokens: int = 0
    compute_wait_s: float = 0.0
    branch: int = 0


class RunLoads:
    """Lookups and loads of one model. Any thread.

    step_blocks: hits end on multiples of this many blocks.
    deadline_s:  longest wait for pages, all attempts together; None leaves the first attempt to the store's own
                 deadline, and further ones take what is in host memory.
    """

    def __init__(
        self,
        store: KVStore,
        bridge: CacheBridge,
        step_blocks: int,
        counters: ConnectorCounters,
        deadline_s: float | None,
    ) -> None:
        self._store = store
        self._bridge = bridge
        self._block_size = store.layout.block_size
        self._step_blocks = step_blocks
        self._counters = counters
        self._deadline_s = deadline_s

    def match(self, request: Request, may_block: Callable[[], bool]) -> Generator[None, None, Matched]:
        """Tokens that can be loaded; waits at most the lookup deadline."""
        until = time.monotonic() + PENDING_MAX_S
        try:
            while True:
                may_wait = may_block()
                found = self._store.wait_lookup(request) if may_wait else self._store.lookup(request)
                if may_wait or not found.pending or time.monotonic() > until:
                    break
                if found.cut is CutReason.COMPUTING:  # the store sees to it that this ends
                    until = time.monotonic() + PENDING_MAX_S
                yield
        except Exception as error:
            self._counters.load_failures += 1
            log_failure(log, "a lookup failed, the prompt is computed", error)
            return Matched()
        num_tokens = self._resumable(found.num_blocks, request) * self._block_size
        return Matched(num_tokens, found.compute_wait_s, found.without_state * self._block_size)

    def find(self, tokens: Any, options: RequestOptions | None = None) -> dict[str, int]:
        """Tokens of a prompt that would be loaded, by tier; waits at most the lookup deadline. Loads nothing.

        Raises RequestError for bad options, which are the caller's mistake.
        """
        try:
            request = self._store.request(tokens, options)
            found = self._store.peek(request)
        except RequestError:
            raise
        except Exception as error:
            log_failure(log, "a prompt was not looked for", error)
            return {}
        return tokens_by_tier(found.by_tier, self._resumable(found.num_blocks, request), self._block_size)

    def load(self, request: Request, num_tokens: int, may_block: Callable[[], bool]) -> Generator[None, None, Loaded]:
        """Load the first `num_tokens` tokens, or what arrives of them within the load deadline, into a new cache."""
        wanted = self._resumable(num_tokens // self._block_size, request)
        try:
            loaded = yield from self._load(request, wanted, may_block)
        except Exception as error:
            self._counters.load_failures += 1
            log_failure(log, f"a load of {wanted} blocks failed, the prompt is computed", error)
            loaded = None
        if loaded is None:
            self._counters.short_loads += wanted > 0
            return Loaded(self._bridge.new_cache())
        self._counters.loads += 1
        self._counters.loaded_tokens += loaded.num_tokens
        self._counters.short_loads += loaded.num_tokens < wanted * self._block_size
        return loaded

    def _resumable(self, num_blocks: int, request: Request) -> int:
        return resume_blocks(num_blocks, request.num_tokens, self._block_size, self._step_blocks)

    def _load(
        self, request: Request, wanted: int, may_block: Callable[[], bool]
    ) -> Generator[None, None, Loaded | None]:
        """Lease, wait, copy; None if nothing could be had. Every lease is ended here."""
        began = time.monotonic()
        for attempt in range(LOAD_ATTEMPTS):
            if not wanted:
                return None
            lease = self._store.prepare_load(request, wanted)
            try:
                status = yield from self._wait(lease, self._time_left(began, attempt), may_block)
                usable = self._resumable(status.num_blocks, request)
                if usable and (usable == status.num_blocks or self._bridge.can_be_cut):
                    cache = self._bridge.load(lease.pages, usable, self._store.slots.array)
                    by_tier = tokens_by_tier(lease.by_tier, usable, self._block_size)
                    self._store.complete(lease)
                    return Loaded(cache, usable * self._block_size, by_tier)
            finally:
                self._store.release(lease)  # a no-op after complete
            if status.state is not LeaseState.READY:
                return None  # the deadline: what is still on its way helps the next request
            # A page was lost, and with it every resume point whose windows this lease has. The store knows by now: what
            # does it have at a boundary below?
            less = usable or self._resumable(self._store.lookup(request).num_blocks, request)
            wanted = less if less < wanted else 0
        return None

    def _wait(
        self, lease: LoadLease, timeout_s: float | None, may_block: Callable[[], bool]
    ) -> Generator[None, None, LeaseStatus]:
        until = time.monotonic() + (POLL_DEADLINE_S if timeout_s is None else timeout_s)
        if may_block():
            return self._store.wait(lease, timeout_s)
        while (status := self._store.poll(lease)).state is LeaseState.WAITING and time.monotonic() < until:
            yield
            if may_block():
                return self._store.wait(lease, max(0.0, until - time.monotonic()))
        return status

    def _time_left(self, began: float, attempt: int) -> float | None:
        """Seconds that a wait may take, so that all attempts together keep to one deadline; None: the store's own."""
        if self._deadline_s is not None:
            return max(0.0, began + self._deadline_s - time.monotonic())
        return None if attempt == 0 else 0.0
