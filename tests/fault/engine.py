"""A small engine: threads that ask the store for prompts without end, as a connector would, and check every byte.

    lookup -> load, compare every byte -> compute what did not come -> save it -> finished

A request is answered right if every block it ended with, loaded or computed, has the bytes of that block. A page that
does not come is computed, so a failing store makes requests slower and never wrong. How long each call of the store
took is noted by the name of the call.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.plan.records import Request
from kvstore.store import LocalStore
from tests.helpers.stores import page_of, prompt

THINK_S = 0.002  # between two requests of a thread: it leaves the processor to the store
POLL_S = 0.01


@dataclass(slots=True)
class Tally:
    """What became of requests. Written by the engine's threads under its lock.

    right:    requests all of whose blocks had the right bytes; `wrong` the others.
    errors:   what the store raised: nothing, ever.
    slowest:  longest call in seconds, by name.
    """

    requests: int = 0
    right: int = 0
    wrong: int = 0
    loaded_blocks: int = 0
    computed_blocks: int = 0
    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)


class Engine:
    """Threads that make requests from `start` to `stop`. `begin` starts a new tally, `tally` is the one that runs.

    prompts:          (blocks, seed) of the prompts, chosen at random.
    tokens_per_s:     what the engine says it computes, for load-or-recompute; None says nothing.
    """

    def __init__(
        self,
        store: LocalStore,
        prompts: Sequence[tuple[int, int]],
        *,
        threads: int = 3,
        seed: int = 0,
        tokens_per_s: float | None = None,
        think_s: float = THINK_S,
    ) -> None:
        self.tally = Tally()
        self._store = store
        self._tokens = [prompt(blocks, at) for blocks, at in prompts]
        self._tokens_per_s = tokens_per_s
        self._think_s = think_s
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._pages: dict[bytes, npt.NDArray[np.uint8]] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(seed + i,), name=f"engine-{i}", daemon=True)
            for i in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def begin(self) -> Tally:
        """Start a new tally; calls that end from now on count there."""
        with self._lock:
            self.tally = Tally()
            return self.tally

    def run(
        self,
        seen: Callable[[], bool] = lambda: True,
        *,
        requests: int = 0,
        limit_s: float = 10.0,
        each: Callable[[], object] = lambda: None,
    ) -> bool:
        """Wait until `requests` more have ended and `seen`; False after `limit_s`. `each` is called all the while."""
        until = time.monotonic() + limit_s
        tally, first = self.tally, self.tally.requests
        while tally.requests - first < requests or not seen():
            if time.monotonic() > until:
                return False
            each()
            time.sleep(POLL_S)
        return True

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the threads after their present request."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), f"{thread.name} has not ended its request within {timeout_s} s"

    # -- a request -----------------------------------------------------------------------------------------------------

    def _work(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        while not self._stopping.is_set():
            tokens = self._tokens[random.integers(len(self._tokens))]
            try:
                is_right, loaded, computed = self._answer(tokens)
            except Exception:
                with self._lock:
                    self.tally.requests += 1
                    self.tally.errors.append(traceback.format_exc())
                self._stopping.wait(POLL_S)  # an error that comes at once must not fill the list
                continue
            with self._lock:
                self.tally.requests += 1
                self.tally.right += is_right
                self.tally.wrong += not is_right
                self.tally.loaded_blocks += loaded
                self.tally.computed_blocks += computed
            self._stopping.wait(self._think_s)

    def _answer(self, tokens: npt.NDArray[np.int64]) -> tuple[bool, int, int]:
        store = self._store
        request = self._timed("request", store.request, tokens)
        answer: list[npt.NDArray[np.uint8]] = []
        match = self._timed("wait_lookup", store.wait_lookup, request)
        lease = self._timed("prepare_load", store.prepare_load, request, match.num_blocks)
        try:
            status = self._timed("wait", store.wait, lease)
            answer = [
                store.slots.array(page.slot)[: store.layout.stored_bytes(page.group)].copy()
                for page in lease.pages
                if page.block < status.num_blocks
            ]
        finally:
            self._timed("complete", store.complete, lease)
        loaded = len(answer)
        answer += [self._compute(request, block) for block in range(loaded, len(request.keys))]
        if self._tokens_per_s is not None:
            num_tokens = request.num_tokens - loaded * store.layout.block_size
            store.observe_prefill(num_tokens, num_tokens / self._tokens_per_s)
        self._save(request, loaded)
        self._timed("finished", store.keep.finished, request)
        is_right = all(
            np.array_equal(bytes_, self._compute(request, block)) for block, bytes_ in enumerate(answer[:loaded])
        )
        return is_right, loaded, len(answer) - loaded

    def _save(self, request: Request, first: int) -> None:
        store = self._store
        lease = self._timed("prepare_save", store.prepare_save, request, first, len(request.keys) - first)
        try:
            for page in lease.pages:
                data = self._compute(request, page.block)
                np.copyto(store.slots.array(page.slot)[: len(data)], data)
            self._timed("complete", store.complete, lease)
        finally:
            store.release(lease)  # nothing after complete

    def _compute(self, request: Request, block: int) -> npt.NDArray[np.uint8]:
        key = request.keys[block]
        page = self._pages.get(key)
        if page is None:
            page = self._pages[key] = page_of(key, 0, self._store.layout.stored_bytes(0))
        return page

    def _timed(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        try:
            return call(*args)
        finally:
            seconds = time.monotonic() - began
            with self._lock:
                slowest = self.tally.slowest
                slowest[name] = max(slowest.get(name, 0.0), seconds)
