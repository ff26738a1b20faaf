"""Runs the requests of one replica on one model: who waits, who is next, and who is gone.

One thread computes, and does nothing else. Everything else happens in the event loop, between two steps: a step is
one chunk of a prompt or one token. In a round every request that is past its prompt gets a token, and then *one* prompt
gets *one* chunk. So a long prompt never holds up the others' tokens for more than a chunk, and since each forward is
over one sequence, what a request is answered does not depend on who else is there.

The hard thing: a request may be given up at any moment, also while a step of it is under way. It is then only marked;
the loop closes it between two steps, on the computing thread, and what it held (cache, leases, budget) is free when it
has left `running`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from connectors.transformers.runner import Job, ModelSpec, Runner
from kvstore import logs
from kvstore.cluster.admission import Admission
from kvstore.cluster.answer import ReplicaAnswer
from kvstore.cluster.breakpoints import hint_of
from kvstore.cluster.messages import ChatMessage
from kvstore.cluster.metrics import ReplicaMetrics
from kvstore.config.sections import Config
from kvstore.errors import StoreClosed

if TYPE_CHECKING:
    from connectors.transformers.report import Found

log = logs.limited(__name__)

T = TypeVar("T")

POLL_S = 0.002  # where all that run wait for a tier or for another's computing: asked again after this
DRAIN_STEP_S = 0.02


class Engine:
    """The model, its thread, and the requests. The loop's thread only.

    max_running: requests that are computed in turns; each holds its own cache. The others wait.
    """

    def __init__(self, spec: ModelSpec, config: Config, admission: Admission, max_running: int) -> None:
        self.spec = spec
        self.admission = admission
        self.metrics = ReplicaMetrics()
        self.max_running = max_running
        self._config = config
        self._runner: Runner | None = None
        self._queue: deque[ReplicaAnswer] = deque()
        self._running: list[ReplicaAnswer] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._computing = ThreadPoolExecutor(1, "replica-compute")
        # Tokenizing and looking up for routers; beside the model, so that they do not wait for a step.
        self._reading = ThreadPoolExecutor(1, "replica-read")

    @property
    def runner(self) -> Runner:
        """The model. After `open`."""
        assert self._runner is not None
        return self._runner

    @property
    def has_own_store(self) -> bool:
        """Whether the store is in this process, and not a daemon's."""
        return self._config.service.url is None

    @property
    def is_alive(self) -> bool:
        """False if the loop that computes has died, which only a fault of ours can bring about."""
        return self._task is None or not self._task.done()

    @property
    def num_queued(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that are computed."""
        return len(self._running)

    async def open(self) -> None:
        """Load the model, open the store, warm up. Raises what loading and opening raise."""
        self._runner = await self._compute(Runner, self.spec, self._config)
        report = await self._compute(self._runner.warm_up)
        self.admission.prefill.observe(report.computed_tokens, report.prefill_s)
        self.admission.decode.observe(report.new_tokens - 1, report.decode_s)
        self.metrics.attach(
            self.admission,
            num_running=lambda: self.num_running,
            num_queued=lambda: self.num_queued,
            store=self.runner.store if self.has_own_store else None,
        )
        self._task = asyncio.create_task(self._serve())

    async def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a conversation."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self.runner.encode, prompt)

    async def breakpoints(self, messages: Sequence[ChatMessage], tokens: Sequence[int]) -> dict[str, Any] | None:
        """The hint that the breakpoints of a conversation are, whose prompt is `tokens`; None without breakpoints."""
        if not any(True for message in messages for _ in message.breakpoints):
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, hint_of, messages, tokens, self.runner.encode)

    async def lookup(self, job: Job) -> Found:
        """The part of a prompt that the tiers have. Loads nothing."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self.runner.lookup, job)

    async def stats(self) -> dict[str, Any]:
        """Numbers of the store; of the daemon's, where there is one."""
        return await asyncio.to_thread(self.runner.store.stats)

    def submit(self, job: Job, arrived: float) -> ReplicaAnswer:
        """Admit a request. Raises RequestError for what the model cannot do, Refused if there is no room now."""
        run = self.runner.start(job)
        ticket = self.admission.enter(len(job.tokens), job.max_new_tokens, self.num_queued)
        answer = ReplicaAnswer(run, ticket, arrived)
        self._queue.append(answer)
        self._wake.set()
        return answer

    def cancel(self, answer: ReplicaAnswer) -> None:
        """Nobody listens any more. Idempotent, also after the end."""
        answer.is_cancelled = True
        if answer in self._queue:
            self._queue.remove(answer)
            self.metrics.cancelled.inc()
            self._leave(answer)
        self._wake.set()

    async def close(self, drain_s: float) -> None:
        """Finish what is inside, at most `drain_s`; then end the rest, save, and close the store. Idempotent."""
        until = time.monotonic() + drain_s
        while (self._queue or self._running) and self.is_alive and time.monotonic() < until:
            await asyncio.sleep(DRAIN_STEP_S)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for answer in [*self._queue, *self._running]:
            log.warning("close: a request of %d tokens is not finished after %.1f s", answer.ticket.tokens, drain_s)
            await self._close(answer, StoreClosed("the replica is closing"))
        self._queue.clear()
        self._running.clear()
        if self._runner is not None:
            await self._compute(self._runner.close, max(1.0, until - time.monotonic()))
            self._runner = None
        self._computing.shutdown()
        self._reading.shutdown()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            while True:
                await self._end_cancelled()
                while self._queue and len(self._running) < self.max_running:
                    self._running.append(self._queue.popleft())
                if not self._running:
                    self._wake.clear()
                    await self._wake.wait()
                elif not await self._round():
                    await asyncio.sleep(POLL_S)
        except Exception as error:
            log.error("the engine has stopped: %s", logs.where(error))
            for answer in [*self._queue, *self._running]:
                answer.end(error)
            raise

    async def _round(self) -> bool:
        """A token for everyone who is past the prompt, then a chunk for the oldest prompt that has what it needs.

        False if nothing could be computed, because all wait for the store.
        """
        decoding = [answer for answer in self._running if answer.ttft_s]
        prompts = [answer for answer in self._running if not answer.ttft_s]
        computed = False
        for answer in decoding:
            computed |= await self._step(answer)
        for answer in prompts:
            if await self._step(answer):
                return True
        return computed

    async def _step(self, answer: ReplicaAnswer) -> bool:
        """One step; whether it computed anything."""
        if answer.is_cancelled:
            return False
        run = answer.run
        answer.queue_s = answer.queue_s or time.monotonic() - answer.arrived
        began = time.perf_counter()
        try:
            pieces = await self._compute(run.step)
        except Exception as error:
            log.warning("a request of %d tokens failed: %s", answer.ticket.tokens, logs.where(error))
            self._running.remove(answer)
            await self._close(answer, error)
            return True
        if not run.is_waiting:
            self._account(answer, len(pieces), time.perf_counter() - began)
        for piece in pieces:
            answer.put(piece.text, run.finish_reason if run.is_done else None)
        if run.is_done:
            self._running.remove(answer)
            self.metrics.finished(answer)
            self._leave(answer)
        return not run.is_waiting

    def _account(self, answer: ReplicaAnswer, new_tokens: int, seconds: float) -> None:
        """Keep the books: what is left of a request, how fast we are."""
        ticket, report = answer.ticket, answer.report
        if answer.ttft_s:
            self.admission.decode.observe(new_tokens, seconds)
            self.metrics.token(seconds)
        elif new_tokens:
            answer.ttft_s = time.monotonic() - answer.arrived
            if report.computed_tokens >= self.spec.prefill_chunk:  # a short rest is mostly fixed cost, and says little
                self.admission.prefill.observe(report.computed_tokens, report.prefill_s)
            self.metrics.first_token(answer)
            ticket.prompt_left = 0
        else:
            ticket.prompt_left = max(0, min(ticket.prompt_left, report.computed_tokens) - self.spec.prefill_chunk)
        ticket.new_left -= new_tokens

    async def _end_cancelled(self) -> None:
        for answer in [answer for answer in self._running if answer.is_cancelled]:
            self._running.remove(answer)
            self.metrics.cancelled.inc()
            await self._close(answer)

    async def _close(self, answer: ReplicaAnswer, error: Exception | None = None) -> None:
        """End a request that has not come to its end."""
        try:
            await self._compute(answer.run.close)
        except Exception as failed:
            log.error("a request of %d tokens could not be closed: %s", answer.ticket.tokens, logs.where(failed))
        self._leave(answer, error)

    def _leave(self, answer: ReplicaAnswer, error: Exception | None = None) -> None:
        self.admission.leave(answer.ticket)
        self.metrics.left(answer)
        answer.end(error)

    async def _compute(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._computing, call, *arguments)
