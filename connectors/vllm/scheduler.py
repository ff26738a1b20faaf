"""The scheduler's half: one plan per engine step for the workers, one report per step from them.

It lives in vLLM's engine core, on the scheduler's thread; the store moves bytes between host memory and the lower tiers
on threads of its own, here or in a daemon. What is promised to vLLM and loaded is decided in loads.py, what is
saved in saves.py; here their copies become a plan, and a copy has ended when every rank has reported it: a page of
which one rank has no part is a page that nobody has.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from connectors.answers import NOT_KNOWN, PROMPT, SavedAnswers
from connectors.vllm import hints, loads, saves
from connectors.vllm.config import ConnectorConfig
from connectors.vllm.events import Announcer, News
from connectors.vllm.layout import EngineLayout
from connectors.vllm.loads import SchedulerLoads
from connectors.vllm.messages import IDLE_WAIT_S, StepPlan, StepReport
from connectors.vllm.requests import Requests
from connectors.vllm.saves import SchedulerSaves
from kvstore.base import HintStatus, KVStore, Slab

log = logging.getLogger("vllm.kvstore")  # below vLLM's logger, so that its handlers and level apply

COUNTERS = (
    *loads.COUNTERS,
    *saves.COUNTERS,
    "loaded_bytes",
    "load_seconds",
    "saved_bytes",
    "save_seconds",
    "hook_errors",
    *(f"hints.{status.value}" for status in HintStatus),
)


class SchedulerHalf:
    """Decides for one engine. The scheduler's thread, but for `saved`.

    world:      ranks that report each copy.
    is_beside:  workers can copy beside the forward (layers.py).
    is_whole:   vLLM can compute the last token alone of a prompt that was loaded to its end.
    identify:   names what makes a request's KV different and vLLM's hashes do not cover (its adapter's files).
    answers:    whose blocks are saved; None: as `save` says, without knowing the chat template.
    name:       of this half, so that a worker in this process knows whose plan it has.
    """

    def __init__(
        self,
        store: KVStore,
        engine: EngineLayout,
        config: ConnectorConfig,
        *,
        world: int = 1,
        is_beside: bool = False,
        is_whole: bool = False,
        identify: Callable[[Any], str] = lambda request: "",
        answers: SavedAnswers | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.name = uuid.uuid4().hex
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self._engine = engine
        self._config = config
        self._world = world
        is_single = config.store.store.single_flight and config.loads and config.saves
        self._requests = Requests(store, engine, identify, single_flight=is_single, whole=is_whole)
        self._loads = SchedulerLoads(store, engine, config, self._requests, self.counters, now, is_beside)
        answers = answers or SavedAnswers(config.fields.save, NOT_KNOWN, PROMPT)
        self._saves = SchedulerSaves(store, engine, config, self._requests, self.counters, world, answers)
        self._announcer = Announcer(engine.group_ids)
        self._slabs: tuple[Slab, ...] = ()
        self._ranks: dict[int, int] = {}
        self._broken: set[int] = set()
        self._heard: tuple[int, ...] = ()

    def bind_pool(self, pool: Any) -> None:
        """Learn vLLM's block pool, in which blocks under a save are held."""
        self._saves.pool = pool

    # ---- requests ---------------------------------------------------------------------------------------------

    def new_request(self, request: Any) -> None:
        """A request came."""
        self._requests.begin(request)
        for message in hints.messages(request):
            self._hint(request, message)

    def matched(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """How many tokens after the first `num_computed` can be loaded, and whether aside; None means ask again."""
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False  # every token has to be computed (prompt_logprobs, some kinds of pooling)
        tracked = self._requests.get(request.request_id)
        return self._loads.matched(tracked, num_computed) if tracked and self._config.loads else (0, False)

    def allocated(self, request: Any, blocks: Sequence[Sequence[Any]], num_external: int) -> None:
        """vLLM has blocks for the request, of which `num_external` tokens are to be loaded.

        blocks: vLLM's blocks per one of its groups, from the start of the prompt.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is not None:
            self._loads.allocated(tracked, blocks, num_external)

    def refuse(self, request: Any, blocks: Sequence[Sequence[Any]]) -> None:
        """Report the load that vLLM counts on as failed, so that it computes."""
        self._loads.refuse(request.request_id, self._requests.get(request.request_id), blocks)

    def hit_sources(self, request: Any, num_tokens: int) -> dict[str, int]:
        """The origin of the tokens that are loaded for the request, by tier."""
        tracked = self._requests.get(request.request_id)
        return {} if tracked is None else self._loads.sources(tracked, num_tokens)

    def request_finished(self, request: Any) -> dict[str, Any] | None:
        """The request is over, well or not; returns what became of its hints, None if it had none."""
        tracked = self._requests.end(request.request_id)
        self._saves.request_finished(request.request_id, tracked)
        if tracked is None:
            return None
        self._loads.let_go(tracked)
        status = getattr(getattr(request, "status", None), "name", "").removeprefix("FINISHED_").lower()
        reason = tracked.finish_reason if tracked.finish_reason and status == "stopped" else status
        reply_tokens = getattr(request, "num_output_tokens", -1)
        self.store.keep.finished(tracked.store, finish_reason=reason, reply_tokens=reply_tokens)
        return hints.answer(tracked.outcomes)

    # ---- one step ---------------------------------------------------------------------------------------------

    def plan_step(self, scheduled: Mapping[str, int], block_ids: Callable[[str], Any]) -> StepPlan:
        """The copies of the step that vLLM has just scheduled.

        scheduled: tokens per request. block_ids: vLLM's block ids of a request, per group, or None.
        """
        for name, num_tokens in scheduled.items() if self._config.saves else ():
            tracked = self._requests.get(name)
            if tracked is not None:
                self._saves.plan(name, tracked, num_tokens, block_ids)
        plan = StepPlan(sum(scheduled.values()), self._engine.layout.fingerprint, self.name, heard=self._heard)
        self._heard = ()
        self._loads.scheduled = scheduled
        plan.loads, plan.saves = self._loads.take_jobs(), self._saves.take_jobs()
        try:
            self._add_slabs(plan)
            self._loads.wait(0.0 if scheduled or plan.loads or plan.saves else IDLE_WAIT_S)
        except Exception:  # the plan must go out all the same: vLLM counts on its loads
            log.exception("kvstore: where slots lie is not known; nothing is copied in this step")
            plan.layout = ""  # which no worker has: it reports all its copies as failed
        return plan

    def reported(self, report: StepReport) -> None:
        """Book what the ranks have copied."""
        for name in ("loaded_bytes", "load_seconds", "saved_bytes", "save_seconds"):
            self.counters[name] += getattr(report, name)
        self._broken |= report.failed
        self._heard += tuple(report.failed)
        for lease in report.failed:
            if self._loads.has(lease) and self._loads.failed(lease, report.error):
                self._saves.distrust()
        for lease, ranks in report.done.items():
            ranks += self._ranks.pop(lease, 0)
            if ranks < self._world:
                self._ranks[lease] = ranks
                continue
            is_good = lease not in self._broken
            self._broken.discard(lease)
            try:
                if self._loads.has(lease):
                    self._loads.ended(lease, is_good)
                elif self._saves.has(lease):
                    self._saves.ended(lease, is_good)
            except Exception:  # the others of this report hold blocks and slots, too
                log.exception("kvstore: the end of lease %d could not be booked", lease)
        if report.forward_tokens:
            self.store.observe_prefill(report.forward_tokens, report.forward_seconds)

    def saved(self, lease_id: int, ok: bool) -> None:
        """A save of the only rank ended. Any thread; publishes at once what `reported` would at the next step."""
        self._saves.saved(lease_id, ok)

    def _hint(self, request: Any, message: object) -> None:
        """Hand a message to the store, with the prompt that it came with."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        self._requests.extend(tracked)
        outcomes = self.store.hint(message, tracked.store)
        tracked.outcomes += outcomes
        for outcome in outcomes:
            self.counters[f"hints.{outcome.status.value}"] += 1

    def _add_slabs(self, plan: StepPlan) -> None:
        """Tell the workers where slots lie, if they need to know."""
        slabs = tuple(self.store.slots.slabs)
        if plan.loads or plan.saves or slabs != self._slabs:
            plan.slabs = slabs
        if slabs != self._slabs:
            self._slabs = slabs
            self._loads.allow(slabs[-1].num_slots if slabs else 0)

    # ---- events for routers -----------------------------------------------------------------------------------

    def announce(self) -> None:
        """Note what comes and goes for `take_news`, from now on."""
        self.store.want_events()
        self._requests.on_named = self._announcer.name

    def take_news(self) -> list[News]:
        """The blocks that came and went since the last call. Does not wait."""
        return self._announcer.tell(self.store.take_events())

    # ---- the engine as a whole --------------------------------------------------------------------------------

    @property
    def is_saving(self) -> bool:
        """True while ranks are copying: vLLM has to go on stepping to hear of it."""
        return bool(self._saves)

    @property
    def is_busy(self) -> bool:
        """True while there are requests."""
        return bool(self._requests)

    def reset(self, salt: str) -> None:
        """Forget everything for this engine: pages stored so far have other names from now on."""
        self._requests.salt = salt
        for tracked in self._requests:
            self._loads.let_go(tracked)
            self._requests.end(tracked.engine.request_id)
            self.store.keep.finished(tracked.store)  # nobody waits for what it would have computed
        self._saves.spoil()
        self._announcer.forget()

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind what is left and stop."""
        for tracked in self._requests:
            self._loads.let_go(tracked)
        self.store.close(timeout_s)
