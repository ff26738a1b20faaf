"""One prompt's way through a store: what stands beside the forwards and never gets in their way.

A `StoreSession` is told before and after each forward, records what is to be saved, and says in the end that the
request is over. A `ColdSession` has the same face and does nothing: a run without a store is the same code.

The hard thing: a forward that fails leaves some layers a step ahead of others. From then on nothing of that cache is
saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from connectors.transformers.connector import TransformersConnector
from connectors.transformers.loads import Loaded
from kvstore.base import HintOutcome, HintStatus, Request, RequestOptions
from kvstore.prefix.answers import AnswerJudge, AnswerVerdict
from radix.tokens import TokenArray

log = logging.getLogger(__name__)

UNUSED = "the store is not used for this request"


class ColdSession:
    """A prompt that no store knows of."""

    def __init__(self, cache: Any, bypassed: str = "") -> None:
        self.cache = cache
        self.bypassed = bypassed  # why the store is not used, where the model is the reason
        self.num_tokens = 0  # loaded
        self.by_tier: dict[str, int] = {}
        self.compute_wait_s = 0.0  # while another request computed the same blocks
        self.outcomes: tuple[HintOutcome, ...] = ()  # of the hints that came with it
        self.branch = 0  # tokens whose keys and values are stored, with a state at their end or without
        self.unsaved_pages = 0  # of an answer that no next turn can begin with; known at the end

    def before(self, tokens: TokenArray, first: int) -> None:
        """`tokens`, which stand at `first`, are about to be run through the model."""

    def after(self, num_tokens: int, seconds: float) -> None:
        """The forward is done, in `seconds`; the cache holds `num_tokens` tokens now."""

    def prompt_done(self) -> None:
        """The prompt is in the cache and the first token is known: save."""

    def end(self, finish_reason: str, *, last_turn: bool, reply_tokens: int = -1) -> None:
        """The request is over, well or not. reply_tokens: of the answer; -1 where the caller goes on by itself."""


class StoreSession(ColdSession):
    """A prompt that was looked up and loaded, and whose new blocks are saved.

    The request's thread only. Never raises.
    """

    def __init__(
        self,
        connector: TransformersConnector,
        request: Request,
        loaded: Loaded,
        answer: AnswerJudge | None,
        branch: int = 0,
    ) -> None:
        super().__init__(loaded.cache)
        self.branch = branch
        self.num_tokens = loaded.num_tokens
        self.by_tier = loaded.by_tier
        self._connector = connector
        self._request = request
        self._prompt_tokens = request.num_tokens
        self._savable = connector.savable_tokens(request.num_tokens)
        self._answer = answer
        self._recorder = connector.recorder(loaded)
        self._state_places = connector.state_places(loaded.num_tokens, request.num_tokens, branch)
        self._cached = loaded.num_tokens
        self._recording = True
        self._inside = False  # a forward is under way, or failed
        self._failed = False  # the recorder failed

    def before(self, tokens: TokenArray, first: int) -> None:
        with self._guard():
            decoding = first >= self._prompt_tokens
            if decoding and self._wants_answer and self._is_whole:
                self._hear(tokens)
            self._recording = self._is_whole and (self._wants_answer or first < self._savable)
            if self._recording and self._is_unchanged(decoding, first):
                self._recorder.before()
        self._inside = True

    def after(self, num_tokens: int, seconds: float) -> None:
        with self._guard():
            if self._recording:
                self._recorder.after(num_tokens)
                if num_tokens in self._state_places:
                    self._recorder.keep_state(num_tokens)
                elif num_tokens > self._prompt_tokens and self._connector.is_state_place(num_tokens):
                    self._recorder.keep_state(num_tokens, instead=True)  # the answer may end before the next
                if num_tokens >= self._savable and not self._wants_answer:
                    self._recorder.finish(num_tokens)
            if num_tokens - self._cached == self._connector.prefill_chunk:
                # Only full chunks: a short one is mostly fixed cost, and would make the model look slow.
                self._connector.observe_prefill(num_tokens - self._cached, seconds)
        self._cached = num_tokens
        self._inside = False
        if self._request.options.single_flight and num_tokens <= self._savable:
            self._save(num_tokens)  # others wait for this chunk: they may have it before the prompt is done

    def prompt_done(self) -> None:
        self._save(self._savable)

    def end(self, finish_reason: str, *, last_turn: bool, reply_tokens: int = -1) -> None:
        if self._wants_answer and self._is_whole:
            with self._guard():
                self._recorder.finish(self._cached)
            if self._answer is not None and self._answer.verdict is AnswerVerdict.SAVE:
                self._save(self._cached)
        if self._is_whole and self._answer is not None and self._answer.verdict is not AnswerVerdict.SAVE:
            size = self._connector.block_size
            num_blocks = self._cached // size - self._prompt_tokens // size
            self.unsaved_pages = self._connector.left_out(num_blocks)
        self._connector.finished(
            self._request, finish_reason=finish_reason, last_turn=last_turn, reply_tokens=reply_tokens
        )

    @property
    def _wants_answer(self) -> bool:
        """Whether the answer's blocks are saved, or may be."""
        return self._answer is not None and self._answer.verdict is not AnswerVerdict.DROP

    def _hear(self, tokens: TokenArray) -> None:
        """Take tokens of the answer; the recorder rests as soon as it is known that no next turn begins with them."""
        assert self._answer is not None
        if self._answer.add(tokens.tolist()) is AnswerVerdict.DROP:
            self._recorder.finish(self._cached)
        else:
            self._connector.saves.extend(self._request, tokens)

    @property
    def _is_whole(self) -> bool:
        return not (self._inside or self._failed or self.bypassed)

    def _is_unchanged(self, decoding: bool, first: int) -> bool:
        """False, and nothing of this request is saved from now on, if the model is not what it was at the begin.

        Whole looks before each chunk of a prompt and each block of an answer, glances before the tokens between.
        """
        glance = decoding and first % self._connector.block_size != 0
        if reason := self._connector.bypass_reason(glance=glance):
            self._connector.bypass(reason)
            self.bypassed, self._recording = reason, False
        return self._recording

    def _save(self, num_tokens: int) -> None:
        if self._is_whole:
            with self._guard():
                self._connector.start_save(self._request, self._recorder.take(num_tokens), self._recorder.take_states())

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn a fault of ours into "nothing more of this request is saved"."""
        try:
            yield
        except Exception as error:
            self._failed = True
            self._connector.counters.save_failures += 1
            log.warning("request %d is not saved: %s", self._request.id, error, exc_info=True)


def open_session(
    connector: TransformersConnector | None,
    new_cache: Callable[[], Any],
    tokens: TokenArray,
    options: RequestOptions | None,
    may_block: Callable[[], bool],
    hints: Sequence[object] = (),
) -> Generator[None, None, ColdSession]:
    """Look a prompt up and load what there is; a cold session without a store, or where it must not be used.

    hints: the messages that came with it.

    Yields where it would wait and `may_block()` says no: to be asked again. Closed there, it gives all back.
    """
    reasons: list[str] = []
    request = connector.begin(tokens, options, told=reasons.append) if connector is not None else None
    if connector is None or request is None:
        cold = ColdSession(new_cache(), "".join(reasons))
        cold.outcomes = tuple(HintOutcome("", "envelope", HintStatus.REJECTED, reason=UNUSED) for _ in hints)
        return cold
    try:
        outcomes = connector.hint(request, hints)
        matched = yield from connector.loads.match(request, may_block)
        loaded = yield from connector.loads.load(request, matched.num_tokens, may_block)
        session = StoreSession(connector, request, loaded, connector.judge(tokens), matched.branch)
        session.outcomes = outcomes
        session.compute_wait_s = matched.compute_wait_s
        return session
    except GeneratorExit:
        connector.finished(request, finish_reason="cancelled", reply_tokens=0)
        raise
