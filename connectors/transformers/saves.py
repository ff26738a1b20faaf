"""Saves in the background: new blocks are copied into slots and published by a worker, while the model goes on.

What is said about a request at its end goes through the same worker, after the request's saves: the store must find the
new blocks by then. Nothing here raises: what cannot be saved is skipped, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from sys import maxsize
from typing import Any

from connectors.base import ConnectorCounters, log_failure
from connectors.transformers.cache import CacheBridge, Snapshot, Span
from kvstore.base import KVStore, Request
from kvstore.move.worker import Worker

log = logging.getLogger(__name__)

SAVE_BATCH_BLOCKS = 32  # slots held at once by a save; a guess, so that a long prompt does not empty the pool
CLOSE_TIMEOUT_S = 10.0


class RunSaves:
    """Saves of one model. Any thread, but that it has a thread of its own.

    max_queue: save jobs that may wait; beyond it saves are skipped.
    """

    def __init__(self, store: KVStore, bridge: CacheBridge, counters: ConnectorCounters, max_queue: int) -> None:
        self._store = store
        self._bridge = bridge
        self._counters = counters
        self._worker = Worker("transformers-save", max_queue)
        self._closed = False

    def start(self, request: Request, spans: Sequence[Span], states: Sequence[Snapshot] = ()) -> bool:
        """Queue blocks for saving; False if there is nothing to save or the queue is full.

        The spans hold the tensors until the job has run; their memory is bounded by the queue.
        """
        if not spans and not states:
            return False
        if self._worker.submit(partial(self._save, request, tuple(spans), tuple(states), self._bridge.computed())):
            return True
        self._counters.skipped_saves += 1
        return False

    def extend(self, request: Request, tokens: Any) -> None:
        """Hash the tokens that were generated, so that their blocks can be saved."""
        try:
            self._store.extend(request, tokens)
        except Exception as error:
            self._counters.save_failures += 1
            log_failure(log, "decoded blocks are not saved", error)

    def finish(self, request: Request, finish_reason: str, *, last_turn: bool, reply_tokens: int) -> None:
        """Tell the store that the request is over, after its saves."""
        job = partial(self._finish, request, finish_reason, last_turn, reply_tokens)
        if not self._worker.submit(job):
            job()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all saves so far are in host memory; False if the time ran out."""
        return self._worker.flush(timeout_s)

    def close(self) -> None:
        """Finish what is queued (at most CLOSE_TIMEOUT_S) and stop. Idempotent."""
        if not self._closed:
            self._closed = True
            self._worker.close(CLOSE_TIMEOUT_S)

    def _save(
        self,
        request: Request,
        spans: Sequence[Span],
        states: Sequence[Snapshot],
        wait_computed: Callable[[], None],
    ) -> None:
        """Copy blocks into slots and publish them, a batch at a time. On the worker."""
        first = min(
            min([span.first_block for span in spans], default=maxsize), *(s.num_blocks - 1 for s in states), maxsize
        )
        last = max(max([span.last_block for span in spans], default=0), *(s.num_blocks for s in states), 0)
        last = min(last, len(request.keys))
        try:
            wait_computed()
            for start in range(first, last, SAVE_BATCH_BLOCKS):
                self._save_batch(request, spans, states, start, min(SAVE_BATCH_BLOCKS, last - start))
            self._counters.saves += 1
        except Exception as error:
            self._counters.save_failures += 1
            log_failure(log, f"a save of blocks [{first}, {last}) failed", error)

    def _save_batch(
        self, request: Request, spans: Sequence[Span], states: Sequence[Snapshot], first: int, num_blocks: int
    ) -> None:
        after = [state.num_blocks - 1 for state in states if first < state.num_blocks <= first + num_blocks]
        lease = self._store.prepare_save(request, first, num_blocks, states=after)
        try:
            self._counters.skipped_pages += lease.skipped
            filled = self._bridge.copy_out(spans, lease.pages, self._store.slots.array, states)
            self._store.complete(lease, filled=filled)
            self._counters.saved_pages += sum(filled)
        finally:
            self._store.release(lease)  # a no-op after complete

    def _finish(self, request: Request, finish_reason: str, last_turn: bool, reply_tokens: int) -> None:
        try:
            self._store.keep.finished(
                request, finish_reason=finish_reason, last_turn=last_turn, reply_tokens=reply_tokens
            )
        except Exception as error:
            log_failure(log, "the end of a request was not told", error)
