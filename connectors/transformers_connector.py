"""Between one transformers model and one store: lookups, loads into a fresh cache, saves in the background.

Made once per model and store; any thread. A request walks through it like this:

    request = connector.begin(tokens, options)           # None: this request does not use the store
    loaded = connector.start_load(request, connector.matched_tokens(request))
    ...forwards from loaded.num_tokens on, with connector.recorder(loaded) at their side...
    connector.start_save(request, spans)                 # returns at once
    connector.finished(request)

Nothing here raises for a failing store, a lost page or a full queue: it is counted in `counters`, logged, and the
model computes.

The hard thing: a load that comes out shorter than it was promised. In mode "exact" it must end on a boundary of the
prefill chunks, and with sliding windows the pages for resuming at N are not those for resuming earlier. Such a lease is
given back and another taken at a boundary below; all attempts together keep to one deadline.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from connectors.base import ConnectorCounters, resume_blocks, tokens_by_tier
from connectors.transformers_cache import CacheBridge, Recorder, Span
from connectors.transformers_identity import Reuse, check_reuse, model_namespace, model_state
from connectors.transformers_layout import cache_shapes, layout_of, model_device
from kvstore.base import KVStore
from kvstore.devices.base import Device
from kvstore.errors import ConfigError, KVStoreError, LayoutMismatch, RequestError
from kvstore.move.worker import Worker
from kvstore.plan.records import CutReason, LeaseState, LeaseStatus, LoadLease, Request, RequestOptions

log = logging.getLogger(__name__)

SAVE_BATCH_BLOCKS = 32  # slots held at once by a save; a guess, so that a long prompt does not empty the pool
LOAD_ATTEMPTS = 3  # each one ends at a lower boundary than the one before
CLOSE_TIMEOUT_S = 10.0
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
    """What a lookup found to resume from, and how long it waited for another request to compute it."""

    num_tokens: int = 0
    compute_wait_s: float = 0.0


class TransformersConnector:
    """A `connectors.base.Connector`: its Target is a `Loaded` cache, its Source a list of `Span`s.

    prefill_chunk: tokens per forward of a prompt; a multiple of the block size.
    reuse:         what a hit promises, see `Reuse`.
    save_decode:   save blocks that fill up while decoding too; only with "any", and its default there.
    load_deadline_s: longest wait for pages, all attempts together; None leaves the first attempt to the store's own
                   deadline, and further ones take what is in host memory.
    single_flight: a prompt that another request is computing, here or on another machine, is waited for; prompts are
                   saved chunk by chunk, so that others can follow. A request's own options may ask for it, too.
    device:        moves the bytes; None chooses by where the model is. A device given is the caller's to close.
    max_queue:     save jobs that may wait; beyond it saves are skipped.

    Raises ConfigError, UnsupportedModel or LayoutMismatch if this model and this store cannot work together: the store
    must have been opened with `model_namespace` of this model, chunk and mode. That its weights are the same ones is
    the caller's promise.
    """

    def __init__(
        self,
        model: Any,
        store: KVStore,
        *,
        prefill_chunk: int = 256,
        reuse: Reuse | str = Reuse.EXACT,
        save_decode: bool | None = None,
        load_deadline_s: float | None = None,
        single_flight: bool = False,
        device: Device | None = None,
        max_queue: int = 64,
    ) -> None:
        self.reuse = check_reuse(reuse)
        self.prefill_chunk = prefill_chunk
        self.saves_decode = self.reuse is Reuse.ANY if save_decode is None else save_decode
        if self.saves_decode and self.reuse is Reuse.EXACT:
            raise ConfigError("save_decode is True with reuse 'exact'; a decode step gives other bits than a prefill")
        self.counters = ConnectorCounters()
        self._load_deadline_s = load_deadline_s
        self._single_flight = single_flight
        self._model = model
        self._store = store
        self._block_size = store.layout.block_size
        check_chunk(prefill_chunk, self._block_size)
        shapes = cache_shapes(model)
        layout = layout_of(shapes, self._block_size)
        if layout.fingerprint != store.layout.fingerprint:
            raise LayoutMismatch(f"the store keeps pages of {store.layout}; this model makes pages of {layout}")
        self._check_namespace()
        self._step_blocks = prefill_chunk // self._block_size if self.reuse is Reuse.EXACT else 1
        self._owns_device = device is None
        self._device = device if device is not None else default_device(model)
        if self._owns_device and (slab := getattr(store, "slab_array", None)) is not None:
            self._device.register(slab)
        self._bridge = CacheBridge(model, shapes, layout, self._device)
        self._state = model_state(model)
        if self._state.training:
            raise ConfigError(
                "model: it is in training mode, where dropout makes pages random; call model.eval() first"
            )
        self._worker = Worker("transformers-save", max_queue)
        self._closed = False

    def savable_tokens(self, num_tokens: int) -> int:
        """How many of a prompt's tokens lie in blocks that may be saved."""
        step = self.prefill_chunk if self.reuse is Reuse.EXACT else self._block_size
        return num_tokens // step * step

    def begin(self, tokens: Any, options: RequestOptions | None = None) -> Request | None:
        """Hash a prompt; None if it must not touch the store, because the model has changed or the store failed."""
        self.counters.requests += 1
        try:
            changed = self._state.changes(model_state(self._model))
            if changed:
                self._bypass("model changed: " + ", ".join(changed))
                return None
            return self._store.request(tokens, self._with_turns(options))
        except RequestError:
            raise  # bad options: the caller's mistake, before any work was done
        except Exception as error:
            self.counters.load_failures += 1
            _warn("a request was not looked up and is computed", error)
            return None

    def matched_tokens(self, request: Request) -> int:
        """Tokens that can be loaded, on a boundary this mode can resume from; waits at most the lookup deadline."""
        return _drain(self.match(request, _always)).num_tokens

    def match(self, request: Request, may_block: Callable[[], bool]) -> Generator[None, None, Matched]:
        """The same, step by step: yields where it would wait and `may_block()` says no. Never raises."""
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
            self.counters.load_failures += 1
            _warn("a lookup failed, the prompt is computed", error)
            return Matched()
        return Matched(self._resumable(found.num_blocks, request) * self._block_size, found.compute_wait_s)

    def find(self, tokens: Any, options: RequestOptions | None = None) -> dict[str, int]:
        """Tokens of a prompt that would be loaded, by tier; waits at most the lookup deadline. Loads nothing."""
        try:
            request = self._store.request(tokens, options)
            found = self._store.peek(request)
        except RequestError:
            raise
        except Exception as error:
            _warn("a prompt was not looked for", error)
            return {}
        return tokens_by_tier(found.by_tier, self._resumable(found.num_blocks, request), self._block_size)

    def start_load(self, request: Request, num_tokens: int) -> Loaded:
        """Load the first `num_tokens` tokens, or what arrives of them within the load deadline, into a new cache."""
        return _drain(self.load(request, num_tokens, _always))

    def load(self, request: Request, num_tokens: int, may_block: Callable[[], bool]) -> Generator[None, None, Loaded]:
        """The same, step by step: yields where it would wait and `may_block()` says no. Never raises."""
        wanted = self._resumable(num_tokens // self._block_size, request)
        try:
            loaded = yield from self._load(request, wanted, may_block)
        except Exception as error:
            self.counters.load_failures += 1
            _warn(f"a load of {wanted} blocks failed, the prompt is computed", error)
            loaded = None
        if loaded is None:
            self.counters.short_loads += wanted > 0
            return Loaded(self._bridge.new_cache())
        self.counters.loads += 1
        self.counters.loaded_tokens += loaded.num_tokens
        self.counters.short_loads += loaded.num_tokens < wanted * self._block_size
        return loaded

    def recorder(self, loaded: Loaded) -> Recorder:
        """What remembers the new blocks while the forwards go on."""
        return self._bridge.recorder(loaded.cache, loaded.num_tokens)

    def start_save(self, request: Request, source: Sequence[Span]) -> bool:
        """Queue the blocks of `source` for saving; False if there is nothing to save or the queue is full.

        The spans hold the tensors until the job has run; their memory is bounded by the queue.
        """
        if not source:
            return False
        if self._worker.submit(partial(self._save, request, tuple(source), self._bridge.computed())):
            return True
        self.counters.skipped_saves += 1
        return False

    def extend(self, request: Request, tokens: Any) -> None:
        """Hash the tokens that were generated, so that their blocks can be saved."""
        try:
            self._store.extend(request, tokens)
        except Exception as error:
            self.counters.save_failures += 1
            _warn("decoded blocks are not saved", error)

    def finished(self, request: Request, *, finish_reason: str = "", last_turn: bool = False) -> None:
        """Tell the store, after the request's saves: what it says about the path must find the new blocks there."""
        job = partial(self._finish, request, finish_reason, last_turn)
        if not self._worker.submit(job):
            job()

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell the store how fast this model computes."""
        try:
            self._store.observe_prefill(num_tokens, seconds)
        except Exception as error:
            _warn("a prefill rate was not taken", error)

    def forget(self, request: Request) -> int:
        """Delete the prompt's blocks and all that continue them. Saves still queued are waited for first."""
        self.flush(CLOSE_TIMEOUT_S)
        return self._store.forget(request)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all saves so far are in host memory; False if the time ran out."""
        return self._worker.flush(timeout_s)

    def close(self) -> None:
        """Finish the queued saves (at most CLOSE_TIMEOUT_S) and stop. The store stays open: it is the caller's."""
        if not self._closed:
            self._closed = True
            self._worker.close(CLOSE_TIMEOUT_S)
            if self._owns_device:
                self._device.close()

    def _check_namespace(self) -> None:
        """Refuse a store of another model or mode, where it tells its namespace. The weights are not hashed again."""
        theirs = getattr(self._store, "namespace", None)
        if theirs is None:
            return
        ours = model_namespace(
            self._model,
            self._store.layout,
            prefill_chunk=self.prefill_chunk,
            reuse=self.reuse,
            salt=theirs.salt,
            revision=theirs.revision,
            hash_name=theirs.hash,
        )
        names = ("model", "dtype", "layout", "block_size", "adapter")
        pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
        pairs += [(name, value, dict(theirs.extra).get(name)) for name, value in ours.extra]
        wrong = [f"{name} is {there!r}, here {here!r}" for name, here, there in pairs if here != there]
        if wrong:
            raise ConfigError("the store was opened for another model or mode: " + "; ".join(wrong))

    def _with_turns(self, options: RequestOptions | None) -> RequestOptions | None:
        """Options of a request that takes its turn in computing, where that is wanted."""
        if not (self._single_flight or (options is not None and options.single_flight)):
            return options
        # In mode "exact" only whole chunks are saved, in mode "any" every block.
        return replace(options or RequestOptions(), single_flight=True, step_blocks=self._step_blocks)

    def _bypass(self, reason: str) -> None:
        if reason not in self.counters.reasons:
            log.warning("the store is not used: %s; make a new connector for the model as it is now", reason)
        self.counters.bypassed += 1
        self.counters.reasons[reason] = self.counters.reasons.get(reason, 0) + 1

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
                if usable and (usable == status.num_blocks or not self._bridge.has_sliding):
                    cache = self._bridge.load(lease.pages, usable, self._store.slot_array)
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
        if self._load_deadline_s is not None:
            return max(0.0, began + self._load_deadline_s - time.monotonic())
        return None if attempt == 0 else 0.0

    def _save(self, request: Request, spans: Sequence[Span], wait_computed: Callable[[], None]) -> None:
        """Copy blocks into slots and publish them, a batch at a time. On the worker."""
        first = min(span.first_block for span in spans)
        last = min(max(span.last_block for span in spans), len(request.keys))
        try:
            wait_computed()
            for start in range(first, last, SAVE_BATCH_BLOCKS):
                self._save_batch(request, spans, start, min(SAVE_BATCH_BLOCKS, last - start))
            self.counters.saves += 1
        except Exception as error:
            self.counters.save_failures += 1
            _warn(f"a save of blocks [{first}, {last}) failed", error)

    def _save_batch(self, request: Request, spans: Sequence[Span], first: int, num_blocks: int) -> None:
        lease = self._store.prepare_save(request, first, num_blocks)
        try:
            self.counters.skipped_pages += lease.skipped
            filled = self._bridge.copy_out(spans, lease.pages, self._store.slot_array)
            self._store.complete(lease, filled=filled)
            self.counters.saved_pages += sum(filled)
        finally:
            self._store.release(lease)  # a no-op after complete

    def _finish(self, request: Request, finish_reason: str, last_turn: bool) -> None:
        try:
            self._store.finished(request, finish_reason=finish_reason, last_turn=last_turn)
        except Exception as error:
            _warn("the end of a request was not told", error)


_Answer = TypeVar("_Answer")


def _drain(steps: Generator[None, None, _Answer]) -> _Answer:
    """What steps that may block come to."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        answer: _Answer = end.value
        return answer


def _always() -> bool:
    return True


def check_chunk(prefill_chunk: int, block_size: int) -> None:
    """Raise ConfigError unless `prefill_chunk` is a positive multiple of `block_size`."""
    if prefill_chunk < 1 or prefill_chunk % block_size:
        right = max(1, round(prefill_chunk / block_size)) * block_size
        raise ConfigError(
            f"prefill_chunk is {prefill_chunk}; it must be a multiple of the block size {block_size}, e.g. {right}"
        )


def default_device(model: Any) -> Device:
    """The device that reaches the model's memory."""
    where = model_device(model)
    if where.type == "cuda":
        from kvstore.devices.cuda import CudaDevice

        return CudaDevice(where.index or 0)
    from kvstore.devices.cpu import CpuDevice

    return CpuDevice()


def _warn(what: str, error: Exception) -> None:
    """Log a failure that became a miss; with its traceback where it is none of the store's own errors."""
    log.warning("%s: %s: %s", what, type(error).__name__, error, exc_info=not isinstance(error, KVStoreError))
