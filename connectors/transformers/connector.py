"""Between one transformers model and one store: lookups, loads into a fresh cache, saves in the background.

Made once per model and store; any thread. A request walks through it like this:

    request = connector.begin(tokens, options)           # None: this request does not use the store
    loaded = connector.start_load(request, connector.matched_tokens(request))
    ...forwards from loaded.num_tokens on, with connector.recorder(loaded) at their side...
    connector.start_save(request, spans)                 # returns at once
    connector.finished(request)

Lookups and loads (`loads`) are loads.py, what is saved beside the model (`saves`) saves.py;
who drives several prompts on one thread uses these step by step. Here is what both have in common: one model, one mode,
one store, checked to fit each other, and the decision whether a request touches the store at all.

Nothing here raises for a failing store, a lost page or a full queue: it is counted in `counters`, logged, and the
model computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from connectors.answers import ALL, PROMPT, SavedAnswers
from connectors.base import ConnectorCounters, log_failure
from connectors.transformers.answers import saved_answers
from connectors.transformers.cache import CacheBridge, Recorder, Snapshot, Span
from connectors.transformers.identity import Reuse, check_chunk, check_namespace, check_reuse
from connectors.transformers.layout import cache_shapes, default_device, layout_of
from connectors.transformers.loads import Loaded, RunLoads
from connectors.transformers.saves import CLOSE_TIMEOUT_S, RunSaves
from connectors.transformers.states import plan_for
from connectors.transformers.watch import ModelWatch
from kvstore.base import HintOutcome, KVStore, Request, RequestOptions
from kvstore.devices.base import Device
from kvstore.errors import ConfigError, LayoutMismatch, RequestError
from kvstore.prefix.answers import AnswerJudge
from radix.tokens import TokenArray

log = logging.getLogger(__name__)

MAX_PLACES = 300  # letters of a log line that name what has changed
_WAY_OUT = "; it is again when that is taken back. For a model that is to stay so, make a new connector"


class TransformersConnector:
    """A `connectors.base.Connector`: its Target is a `Loaded` cache, its Source a list of `Span`s.

    prefill_chunk: tokens per forward of a prompt; a multiple of the block size.
    reuse:         what a hit promises, see `Reuse`.
    answers:       which blocks that fill up while decoding are saved, too. None: all of them with "any", none with
                   "exact", where none can be.
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
        answers: SavedAnswers | None = None,
        load_deadline_s: float | None = None,
        single_flight: bool = False,
        device: Device | None = None,
        max_queue: int = 64,
    ) -> None:
        self.reuse = check_reuse(reuse)
        self.prefill_chunk = prefill_chunk
        usual = ALL if self.reuse is Reuse.ANY else PROMPT
        self.answers = saved_answers(usual, self.reuse) if answers is None else answers
        if self.answers.saves_any and self.reuse is Reuse.EXACT:
            raise ConfigError("answers are saved with reuse 'exact'; a decode step gives other bits than a prefill")
        self.counters = ConnectorCounters()
        self._places = ""  # what the last reason was found in
        self._single_flight = single_flight
        self._model = model
        self._store = store
        self.block_size = store.layout.block_size
        check_chunk(prefill_chunk, self.block_size)
        shapes = cache_shapes(model)
        layout = layout_of(shapes, self.block_size)
        if layout.fingerprint != store.layout.fingerprint:
            raise LayoutMismatch(f"the store keeps pages of {store.layout}; this model makes pages of {layout}")
        check_namespace(model, store, prefill_chunk=prefill_chunk, reuse=self.reuse)
        self._step_blocks = prefill_chunk // self.block_size if self.reuse is Reuse.EXACT else 1
        if model.training:
            raise ConfigError(
                "model: it is in training mode, where dropout makes pages random; call model.eval() first"
            )
        self._watch = ModelWatch(model, bits=self.reuse is Reuse.EXACT)
        self._owned_device: Device | None = None
        if device is None:
            device = self._owned_device = default_device(model)
            if (slab := store.slots.buffer) is not None:
                device.register(slab)
        self._bridge = CacheBridge(model, shapes, layout, device)
        self.states = plan_for(model, layout, prefill_chunk, is_exact=self.reuse is Reuse.EXACT)
        self.loads = RunLoads(store, self._bridge, self._step_blocks, self.counters, load_deadline_s)
        self.saves = RunSaves(store, self._bridge, self.counters, max_queue)

    def savable_tokens(self, num_tokens: int) -> int:
        """How many of a prompt's tokens lie in blocks that may be saved."""
        step = self.prefill_chunk if self.reuse is Reuse.EXACT else self.block_size
        return num_tokens // step * step

    def state_places(self, start: int, num_tokens: int, branch: int) -> list[int]:
        """The places of a prompt at which the state is to be kept (see `StatePlan`); none of a model without one."""
        return [] if self.states is None else self.states.places(start, num_tokens, branch)

    def is_state_place(self, num_tokens: int) -> bool:
        """True if a state after so many tokens could be resumed from."""
        return self.states is not None and num_tokens % self.states.unit == 0

    def judge(self, tokens: TokenArray) -> AnswerJudge | None:
        """The judge of the answer to a prompt; None: no answers are saved, and none is missed."""
        return self.answers.judge(tokens)

    def left_out(self, num_blocks: int) -> int:
        """Count blocks of an answer that no next turn can begin with; return how many pages those are."""
        num_pages = max(0, num_blocks) * self._store.layout.block_groups
        self.counters.unsaved_pages += num_pages
        return num_pages

    def begin(
        self, tokens: Any, options: RequestOptions | None = None, *, told: Callable[[str], None] | None = None
    ) -> Request | None:
        """Hash a prompt; None if it must not touch the store, because of the model or because the store failed.

        told: is given the reason where the model is not, on this thread, what its pages were named for.
        """
        self.counters.requests += 1
        try:
            if reason := self.bypass_reason():
                self.bypass(reason)
                if told is not None:
                    told(reason)
                return None
            return self.named(tokens, options)
        except RequestError:
            raise  # bad options: the caller's mistake, before any work was done
        except Exception as error:
            self.counters.load_failures += 1
            log_failure(log, "a request was not looked up and is computed", error)
            return None

    def named(self, tokens: Any, options: RequestOptions | None = None) -> Request:
        """Hash a prompt under the name that the model had when this connector was made, whatever it is now."""
        return self._store.request(tokens, self._with_turns(options))

    def bypass_reason(self, *, glance: bool = False) -> str:
        """Why the model's pages may be neither used nor made now, on this thread; "" where they may.

        To be asked on the thread that computes, before each forward whose pages are to be saved: hooks, autocast and
        the like may come and go between two of them.
        glance: look whether something was added (a hook, a method, a mode), and only then at all that may have changed.
        """
        if glance and self._watch.is_same_at_a_glance():
            return ""
        found = self._watch.findings()
        if not found:
            return ""
        kinds = ", ".join(dict.fromkeys(finding.kind for finding in found))
        places = ", ".join(dict.fromkeys(finding.where for finding in found if finding.where))
        self._places = places if len(places) <= MAX_PLACES else f"{places[:MAX_PLACES]}..."
        return f"model changed: {kinds}"

    def bypass(self, reason: str) -> None:
        """Count and log a request whose pages are not used, or no longer saved, for this reason."""
        if reason not in self.counters.reasons:
            log.warning("the store is not used: %s (%s)%s", reason, self._places, _WAY_OUT)
        self.counters.bypassed += 1
        self.counters.reasons[reason] = self.counters.reasons.get(reason, 0) + 1

    def matched_tokens(self, request: Request) -> int:
        """Tokens that can be loaded, on a boundary this mode can resume from; waits at most the lookup deadline."""
        return _drain(self.loads.match(request, _always)).num_tokens

    def start_load(self, request: Request, num_tokens: int) -> Loaded:
        """Load the first `num_tokens` tokens, or what arrives of them within the load deadline, into a new cache."""
        return _drain(self.loads.load(request, num_tokens, _always))

    def recorder(self, loaded: Loaded) -> Recorder:
        """The recorder of new blocks while the forwards go on."""
        return self._bridge.recorder(loaded.cache, loaded.num_tokens)

    def start_save(self, request: Request, source: Sequence[Span], states: Sequence[Snapshot] = ()) -> bool:
        """Queue the blocks of `source` for saving; False if there is nothing to save or the queue is full."""
        return self.saves.start(request, source, states)

    def hint(self, request: Request, messages: Sequence[object]) -> tuple[HintOutcome, ...]:
        """Hand the messages of KV hints that came with a request to the store. Before `finished`. Never raises."""
        try:
            return tuple(outcome for message in messages for outcome in self._store.hint(message, request))
        except Exception as error:
            log_failure(log, "hints were not taken", error)
            return ()

    def finished(
        self, request: Request, *, finish_reason: str = "", last_turn: bool = False, reply_tokens: int = -1
    ) -> None:
        """Tell the store, after the request's saves: what it says about the path must find the new blocks there."""
        self.saves.finish(request, finish_reason, last_turn=last_turn, reply_tokens=reply_tokens)

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Tell the store how fast this model computes."""
        try:
            self._store.observe_prefill(num_tokens, seconds)
        except Exception as error:
            log_failure(log, "a prefill rate was not taken", error)

    def forget(self, request: Request) -> int:
        """Delete the prompt's blocks and all that continue them. Saves still queued are waited for first."""
        self.saves.flush(CLOSE_TIMEOUT_S)
        return self._store.keep.forget(request)

    def close(self) -> None:
        """Finish the queued saves and stop. The store stays open: it is the caller's. Idempotent."""
        self.saves.close()
        if self._owned_device is not None:
            self._owned_device.close()
            self._owned_device = None

    def _with_turns(self, options: RequestOptions | None) -> RequestOptions | None:
        """Options of a request that takes its turn in computing, where that is wanted."""
        if self.states is not None:
            # What is published of a prompt is of no use to another one before there is a state: nobody waits for it.
            return options if options is None else replace(options, single_flight=False)
        if not (self._single_flight or (options is not None and options.single_flight)):
            return options
        # In mode "exact" only whole chunks are saved, in mode "any" every block.
        return replace(options or RequestOptions(), single_flight=True, step_blocks=self._step_blocks)


_Answer = TypeVar("_Answer")


def _drain(steps: Generator[None, None, _Answer]) -> _Answer:
    """The result of steps that may block."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        answer: _Answer = end.value
        return answer


def _always() -> bool:
    return True
