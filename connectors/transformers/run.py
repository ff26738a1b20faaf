"""One prompt on its way to its answer, step by step.

    run = model.start(prompt, max_new_tokens=64)
    for piece in run: ...                # waits where it must; or, to serve several runs on one thread:

    while not run.is_done:
        pieces = run.step()              # asks the store, or computes one chunk of the prompt, or one token
        if run.is_waiting: ...           # nothing to compute yet: give the thread to other runs first
    run.close()

A step ends where something else may run: while the store is waited for, after every chunk of the prompt, after every
token. Between steps a run holds its cache and, while it loads, a lease; nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from connectors.transformers.forward import Forward, chunk_bounds
from connectors.transformers.report import Generation, Piece, Report
from connectors.transformers.session import ColdSession, open_session
from connectors.transformers.text import Sampler, TextStream

if TYPE_CHECKING:
    import torch

    from connectors.transformers.connector import TransformersConnector
    from kvstore.base import RequestOptions
    from radix.tokens import TokenArray


def _nowhere(branch: int) -> Sequence[int]:
    """The stops of a model without states."""
    return ()


class PromptRun:
    """A prompt being looked up, loaded and computed. Its clock starts with `load`. One thread at a time.

    connector: None computes everything.
    hints:     messages of KV hints about this prompt.
    stops:     where chunks end, too, given how many of the first tokens are stored; with a store or without.
    may_block: whether `load` waits for the store; else it yields where it would. May change between two yields.
    """

    session: ColdSession

    def __init__(
        self,
        forward: Forward,
        connector: TransformersConnector | None,
        new_cache: Callable[[], Any],
        tokens: TokenArray,
        chunk: int,
        options: RequestOptions | None,
        hints: Sequence[object] = (),
        stops: Callable[[int], Sequence[int]] = _nowhere,
    ) -> None:
        self.tokens = tokens
        self.report = Report(len(tokens))
        self.may_block = True
        self.is_computed = False  # all of it is in the cache
        self._forward = forward
        self._connector = connector
        self._new_cache = new_cache
        self._chunk = chunk
        self._options = options
        self._hints = hints
        self._stops = stops
        self._ropes = forward.ropes
        self._rope = None if forward.ropes is None else forward.ropes.fresh()
        self._fed: list[TokenArray] = []  # of a model that computes all again at the border of its rope

    def load(self) -> Generator[None, None, None]:
        """Look the prompt up and load what there is; yields while it waits and may not block."""
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self.session = yield from open_session(
            self._connector, self._new_cache, self.tokens, self._options, lambda: self.may_block, self._hints
        )
        self.report.outcomes = self.session.outcomes
        self.report.by_tier = self.session.by_tier
        self.report.compute_wait_s = self.session.compute_wait_s
        self.report.bypassed = self.session.bypassed
        self.report.load_s = time.perf_counter() - self._started

    def chunks(self, *, all_logits: bool = False) -> Iterator[torch.Tensor]:
        """Compute the rest of the prompt; yields the logits of each chunk's last token, or of all its tokens."""
        also = self._stops(self.session.branch)
        for first, last in chunk_bounds(self.session.num_tokens, len(self.tokens), self._chunk, also):
            began = time.perf_counter()
            logits = self.forward(self.tokens[first:last], first, last_only=not all_logits)
            self.report.prefill_s += time.perf_counter() - began
            self.is_computed = last == len(self.tokens)
            yield logits

    def forward(self, tokens: TokenArray, first: int, *, last_only: bool = True) -> torch.Tensor:
        """One forward over `tokens`, which stand at `first`, with the session told of it."""
        ropes = self._ropes
        if ropes is not None and ropes.restarts:
            if first == ropes.border:
                self.session.cache = self._new_cache()
                tokens, first = np.concatenate([*self._fed, tokens]), 0
            self._fed.append(tokens)
        self.session.before(tokens, first)
        self.report.bypassed = self.session.bypassed
        began = time.perf_counter()
        logits = self._forward(tokens, self.session.cache, first, last_only=last_only, rope=self._rope)
        self.session.after(first + len(tokens), time.perf_counter() - began)
        return logits

    def end(self, finish_reason: str, *, last_turn: bool, reply_tokens: int = -1) -> None:
        """The request is over, well or not. reply_tokens: of the answer; -1 where the caller goes on by itself."""
        self.session.end(finish_reason, last_turn=last_turn, reply_tokens=reply_tokens)
        self.report.unsaved_pages = self.session.unsaved_pages

    def first_token_known(self) -> None:
        """Stop the clock of the first token, then save: in this order."""
        self.report.ttft_s = time.perf_counter() - self._started
        self.report.cpu_s = time.process_time() - self._cpu_started
        self.session.prompt_done()


class GenerationRun(Iterator[Piece]):
    """The pieces of one answer; afterwards, or after `close`, `result` has all of it. One thread at a time.

    Made by `KVCacheModel.start`; nothing is looked up or computed before the first step. Leave it early by `close()`
    (or `with`): what was computed is still saved.

    is_waiting: the last step could do nothing but ask: for a tier, for pages, or for another request's computing.
    is_done:    there will be no further piece.
    """

    def __init__(
        self,
        prompt: PromptRun,
        max_new_tokens: int,
        sampler: Sampler,
        end_ids: frozenset[int],
        text: TextStream | None,
        *,
        last_turn: bool = False,
        told_reason: str = "",
    ) -> None:
        self.finish_reason = "cancelled"  # unless it comes to an end by itself
        self.is_waiting = False
        self.is_done = False
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._sampler = sampler
        self._end_ids = end_ids
        self._text = text
        self._last_turn = last_turn
        self._told_reason = told_reason
        self._tokens: list[int] = []
        self._steps = self._run()

    def step(self) -> list[Piece]:
        """Do one thing and come back: ask the store, compute one chunk of the prompt, or compute one token.

        Returns the piece that came of it, if any; nothing after the end. Never waits for the store.
        """
        self._prompt.may_block = False
        return self._advance()

    @property
    def report(self) -> Report:
        """The origin of the prompt and the times taken, as far as it has come."""
        return self._prompt.report

    @property
    def result(self) -> Generation:
        """The tokens generated so far."""
        text = self._text.text if self._text is not None else ""
        return Generation(list(self._tokens), text, self.finish_reason, self.report)

    def close(self) -> None:
        """Stop generating. Idempotent."""
        self._steps.close()
        self.is_done, self.is_waiting = True, False

    def __next__(self) -> Piece:
        self._prompt.may_block = True
        while not self.is_done:
            for piece in self._advance():
                return piece
        raise StopIteration

    def __enter__(self) -> GenerationRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self) -> list[Piece]:
        try:
            pieces = next(self._steps)
        except BaseException as ended:
            self.is_done, self.is_waiting = True, False
            if isinstance(ended, StopIteration):
                return []
            raise
        if self.finish_reason != "cancelled":
            self._steps.close()
            self.is_done = True
        return pieces

    def _run(self) -> Generator[list[Piece], None, None]:
        """Yield what each step brings: nothing while the store is waited for and the prompt computed, then pieces."""
        run = self._prompt
        self.is_waiting = True
        for _ in run.load():
            yield []
        self.is_waiting = False
        try:
            for logits in run.chunks():
                if run.is_computed:
                    yield from self._decode(logits)
                yield []
        finally:
            reason = self._told_reason if self._told_reason and self.finish_reason == "stop" else self.finish_reason
            run.end(reason, last_turn=self._last_turn, reply_tokens=len(self._tokens))

    def _decode(self, logits: torch.Tensor) -> Generator[list[Piece], None, None]:
        """Yield one piece after the other, without end."""
        report = self.report
        token = self._sampler.pick(logits)
        self._prompt.first_token_known()
        began = time.perf_counter()
        while True:
            report.new_tokens += 1
            report.decode_s = time.perf_counter() - began
            yield [self._piece(token)]
            step = np.array([token], dtype=np.uint32)
            token = self._sampler.pick(self._prompt.forward(step, report.prompt_tokens + report.new_tokens - 1))

    def _piece(self, token: int) -> Piece:
        """The piece of a token; sets the finish reason if it is the last."""
        self._tokens.append(token)
        if token in self._end_ids:
            self.finish_reason = "stop"
        elif len(self._tokens) == self._max_new_tokens:
            self.finish_reason = "length"
        if self._text is None:
            return Piece(token)
        text = self._text.push(token)
        if self.finish_reason != "cancelled":
            text += self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
        return Piece(token, text)
