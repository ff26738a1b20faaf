"""transformers with a store behind it: `KVCacheModel` generates text and computes only what no tier has.

    model = KVCacheModel.open(AutoModelForCausalLM.from_pretrained(...), Config.load(), tokenizer=tokenizer)
    answer = model.generate("...", max_new_tokens=64)
    print(answer.text, answer.report.sources)       # {"host": 1024, "disk": 0, "redis": 0, "computed": 57}

Without a store it is the same code with the same prefill chunks: the cold run that hits are compared with. One prompt
at a time; for batches there are vLLM and SGLang. Any thread may call; each call has its own cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from connectors.transformers_check import PROVEN, check_engine
from connectors.transformers_connector import TransformersConnector, check_chunk
from connectors.transformers_forward import Forward, chunk_bounds
from connectors.transformers_identity import Reuse, model_namespace
from connectors.transformers_layout import model_layout, new_cache
from connectors.transformers_positions import steady_tokens
from connectors.transformers_session import ColdSession, open_session
from connectors.transformers_text import Sampler, Sampling, TextStream
from kvstore.base import KVStore
from kvstore.errors import RequestError, UnsupportedModel
from kvstore.plan.records import RequestOptions
from radix.tokens import TokenArray

if TYPE_CHECKING:
    import torch

    from kvstore.config import Config

__all__ = [
    "Generation",
    "KVCacheModel",
    "Piece",
    "Prefill",
    "Report",
    "Reuse",
    "Sampling",
    "TransformersConnector",
    "UnsupportedModel",
    "check_engine",
    "model_layout",
    "model_namespace",
    "open_store_for",
]

log = logging.getLogger(__name__)

TIERS = ("host", "disk", "redis")  # always named in a report, so that a table has its columns


@dataclass(slots=True)
class Report:
    """Where a prompt's tokens came from and how long it took.

    by_tier:    tokens loaded, by tier.
    load_s:     lookup, waiting for pages and copying them into the cache.
    prefill_s:  computing what was not loaded.
    ttft_s:     from the call to the first token: wall time.
    cpu_s:      the same in CPU seconds of this process, all threads.
    decode_s:   from the first token to the last.
    new_tokens: generated so far.
    """

    prompt_tokens: int
    by_tier: dict[str, int] = field(default_factory=dict)
    load_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    cpu_s: float = 0.0
    decode_s: float = 0.0
    new_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were loaded."""
        return sum(self.by_tier.values())

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def sources(self) -> dict[str, int]:
        """Prompt tokens by where they came from; the values add up to prompt_tokens."""
        return {**dict.fromkeys(TIERS, 0), **self.by_tier, "computed": self.computed_tokens}

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rate of computing the prompt."""
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate of generating after the first token."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt in a cache. logits: [1, 1, vocabulary] of its last token, or of all computed tokens where asked."""

    cache: Any
    logits: torch.Tensor
    report: Report


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token, and the text that became certain with it ("" without a tokenizer)."""

    token: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated.

    tokens:        with the end token, if it came to that.
    finish_reason: "stop" (an end token or a stop string), "length" or "cancelled".
    """

    tokens: list[int]
    text: str
    finish_reason: str
    report: Report


class KVCacheModel:
    """A causal LM of transformers whose prompts are looked up in a store, and saved there.

    store:         opened for this model (see `open_store_for`); stays the caller's. None computes everything.
    tokenizer:     for prompts and stop strings given as text, and for text in the answer.
    prefill_chunk: tokens per forward of a prompt, a multiple of the block size. With reuse="exact" hits end on its
                   multiples.
    reuse:         "exact": logits are bit-equal to a run without a store; "any": finer hits, equal up to rounding.
    save_decode:   with "any", whether blocks that fill up while decoding are saved too (default: yes).
    load_deadline_s: longest wait for the pages of a hit; None takes the store's own (see `TransformersConnector`).
    self_check:    True compares a resumed run with a plain one before the first request; None does so for model types
                   that this package was not tested with.

    Raises UnsupportedModel, ConfigError or LayoutMismatch at construction.
    """

    def __init__(
        self,
        model: Any,
        store: KVStore | None = None,
        *,
        tokenizer: Any = None,
        prefill_chunk: int = 256,
        reuse: Reuse | str = Reuse.EXACT,
        save_decode: bool | None = None,
        load_deadline_s: float | None = None,
        self_check: bool | None = None,
    ) -> None:
        check_chunk(prefill_chunk, store.layout.block_size if store is not None else 1)
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk
        self._forward = Forward(model)
        self._steady_tokens = steady_tokens(model.config)
        self._owned_store: KVStore | None = None
        self.connector: TransformersConnector | None = None
        if store is not None:
            if self_check or (self_check is None and model.config.model_type not in PROVEN):
                check_engine(model).require()
            self.connector = TransformersConnector(
                model,
                store,
                prefill_chunk=prefill_chunk,
                reuse=reuse,
                save_decode=save_decode,
                load_deadline_s=load_deadline_s,
            )

    @classmethod
    def open(
        cls,
        model: Any,
        config: Config,
        *,
        tokenizer: Any = None,
        prefill_chunk: int = 256,
        reuse: Reuse | str = Reuse.EXACT,
        save_decode: bool | None = None,
        salt: str = "",
        revision: str | None = None,
        self_check: bool | None = None,
    ) -> KVCacheModel:
        """Open a store for `model` and own it: `close` closes both."""
        store = open_store_for(model, config, prefill_chunk=prefill_chunk, reuse=reuse, salt=salt, revision=revision)
        try:
            opened = cls(
                model,
                store,
                tokenizer=tokenizer,
                prefill_chunk=prefill_chunk,
                reuse=reuse,
                save_decode=save_decode,
                load_deadline_s=config.store.load_deadline_s,
                self_check=self_check,
            )
        except BaseException:
            store.close()
            raise
        opened._owned_store = store
        return opened

    def prefill(self, prompt: Any, options: RequestOptions | None = None, *, all_logits: bool = False) -> Prefill:
        """Bring a prompt into a cache, computing what no tier has, and save its new blocks in the background.

        all_logits: return those of every computed token, [1, computed_tokens, vocabulary].
        The cache is the caller's: continue it, but do not write into the tensors it holds now.
        """
        tokens = self._ids(prompt)
        run = self._start(tokens, options, max_new_tokens=1)
        try:
            logits = self._prefill(run, all_logits=all_logits)
            run.first_token_known()
        finally:
            run.session.end("prefill", last_turn=False)
        return Prefill(run.session.cache, logits, run.report)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int = 64,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        options: RequestOptions | None = None,
        last_turn: bool = False,
    ) -> Generation:
        """Generate an answer; `stream` with its pieces handed to `on_piece` as they come."""
        stream = self.stream(
            prompt, max_new_tokens, sampling=sampling, stop=stop, eos=eos, options=options, last_turn=last_turn
        )
        for piece in stream:
            if on_piece is not None:
                on_piece(piece)
        return stream.result

    def stream(
        self,
        prompt: Any,
        max_new_tokens: int = 64,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        options: RequestOptions | None = None,
        last_turn: bool = False,
    ) -> TokenStream:
        """Generate piece by piece.

        prompt:    text (needs a tokenizer) or token ids: any flat sequence, array, buffer or tensor, or a batch of one.
        sampling:  greedy if None.
        stop:      strings that end the answer and are not part of it (needs a tokenizer).
        eos:       token ids that end the answer; None takes the model's own.
        last_turn: no further prompt will continue this one; its pages may go first.

        Raises RequestError at once for bad arguments; nothing is computed before the first piece is asked for.
        """
        tokens = self._ids(prompt, max_new_tokens)
        if stop and self.tokenizer is None:
            raise RequestError("stop: strings need a tokenizer; pass one at construction or use eos=")
        text = TextStream(self.tokenizer, stop) if self.tokenizer is not None else None
        sampler, end_ids = Sampler(sampling or Sampling()), self._end_ids(eos)
        return TokenStream(
            lambda out: self._generate(out, tokens, max_new_tokens, sampler, end_ids, options, last_turn), text
        )

    def forget(self, prompt: Any, options: RequestOptions | None = None) -> int:
        """Delete the prompt's blocks and all that continue them, in every tier that can be reached."""
        if self.connector is None:
            return 0
        request = self.connector.begin(self._ids(prompt), options)
        return 0 if request is None else self.connector.forget(request)

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was saved so far can be found by the next request; False if the time ran out."""
        return self.connector is None or self.connector.flush(timeout_s)

    def close(self) -> None:
        """Finish the saves under way; close the store if `open` made it. Idempotent."""
        if self.connector is not None:
            self.connector.close()
        if self._owned_store is not None:
            self._owned_store.close()

    def __enter__(self) -> KVCacheModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, prompt: Any, max_new_tokens: int = 1) -> TokenArray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "prompt: it is text and there is no tokenizer; pass one at construction, or token ids"
                )
            prompt = self.tokenizer(prompt).input_ids
        return self._forward.prompt(prompt, max_new_tokens)

    def _end_ids(self, eos: int | Sequence[int] | None) -> frozenset[int]:
        if eos is None:
            generation = getattr(self.model, "generation_config", None)
            eos = getattr(generation, "eos_token_id", None)
            eos = self.model.config.get_text_config().eos_token_id if eos is None else eos
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)

    def _start(self, tokens: TokenArray, options: RequestOptions | None, max_new_tokens: int) -> _Run:
        """Look the prompt up and load what there is."""
        run = _Run(tokens, self.prefill_chunk)
        connector = self.connector
        if self._steady_tokens is not None and len(tokens) + max_new_tokens > self._steady_tokens:
            # Its positions are encoded by its length: computed in one piece, as transformers does, and kept to itself.
            connector, run.chunk = None, len(tokens)
        run.session = open_session(connector, lambda: new_cache(self.model), tokens, options)
        run.report.by_tier = run.session.by_tier
        run.report.load_s = time.perf_counter() - run.started
        return run

    def _prefill(self, run: _Run, *, all_logits: bool = False) -> torch.Tensor:
        """Compute the rest of the prompt, chunk by chunk."""
        import torch

        kept: list[torch.Tensor] = []
        began = time.perf_counter()
        for first, last in chunk_bounds(run.session.num_tokens, len(run.tokens), run.chunk):
            logits = self._step(run, run.tokens[first:last], first, last_only=not all_logits)
            kept = [*kept, logits] if all_logits else [logits]
        run.report.prefill_s = time.perf_counter() - began
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

    def _step(self, run: _Run, tokens: TokenArray, first: int, *, last_only: bool = True) -> torch.Tensor:
        """One forward, with the session told of it."""
        run.session.before(tokens, first)
        began = time.perf_counter()
        logits = self._forward(tokens, run.session.cache, first, last_only=last_only)
        run.session.after(first + len(tokens), time.perf_counter() - began)
        return logits

    def _generate(
        self,
        out: TokenStream,
        tokens: TokenArray,
        max_new_tokens: int,
        sampler: Sampler,
        end_ids: frozenset[int],
        options: RequestOptions | None,
        last_turn: bool,
    ) -> Generator[tuple[int, bool], None, None]:
        """Yield (token, whether it is the last); `out` learns the report and why it ended."""
        run = self._start(tokens, options, max_new_tokens)
        report = out.report = run.report
        reason = "cancelled"  # unless it comes to an end by itself
        try:
            token = sampler.pick(self._prefill(run))
            run.first_token_known()
            began = time.perf_counter()
            while True:
                report.new_tokens += 1
                report.decode_s = time.perf_counter() - began
                if token in end_ids:
                    reason = "stop"
                elif report.new_tokens == max_new_tokens:
                    reason = "length"
                out.finish_reason = reason
                yield token, reason != "cancelled"
                if out.stopped:
                    reason = "stop"
                if reason != "cancelled":
                    return
                step = np.array([token], dtype=np.uint32)
                token = sampler.pick(self._step(run, step, len(tokens) + report.new_tokens - 1))
        finally:
            out.finish_reason = reason
            run.session.end(reason, last_turn=last_turn)


class _Run:
    """One prompt on its way: its clock starts here."""

    session: ColdSession

    def __init__(self, tokens: TokenArray, chunk: int) -> None:
        self.started, self._cpu_started = time.perf_counter(), time.process_time()
        self.tokens = tokens
        self.chunk = chunk
        self.report = Report(len(tokens))

    def first_token_known(self) -> None:
        """Stop the clock of the first token, then save: in this order."""
        self.report.ttft_s = time.perf_counter() - self.started
        self.report.cpu_s = time.process_time() - self._cpu_started
        self.session.prompt_done()


class TokenStream(Iterator[Piece]):
    """Iterates over the pieces of one answer; afterwards, or after `close`, `result` has all of it.

    Leave it early by `close()` (or `with`): what was computed is still saved.
    """

    def __init__(
        self, start: Callable[[TokenStream], Generator[tuple[int, bool], None, None]], text: TextStream | None
    ) -> None:
        self.report = Report(0)
        self.finish_reason = "cancelled"
        self._tokens: list[int] = []
        self._text = text
        self._generated = start(self)

    @property
    def stopped(self) -> bool:
        """True once a stop string has appeared."""
        return self._text is not None and self._text.stopped

    @property
    def result(self) -> Generation:
        """What was generated so far."""
        text = self._text.text if self._text is not None else ""
        return Generation(list(self._tokens), text, self.finish_reason, self.report)

    def __next__(self) -> Piece:
        token, is_last = next(self._generated)
        self._tokens.append(token)
        if self._text is None:
            return Piece(token)
        text = self._text.push(token)
        return Piece(token, text + self._text.finish() if is_last else text)

    def close(self) -> None:
        """Stop generating."""
        self._generated.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store_for(
    model: Any,
    config: Config,
    *,
    prefill_chunk: int = 256,
    reuse: Reuse | str = Reuse.EXACT,
    salt: str = "",
    revision: str | None = None,
) -> KVStore:
    """Open the configured tiers, or attach to the configured daemon, for the pages of `model` under its namespace."""
    from kvstore.build import open_configured

    check_chunk(prefill_chunk, config.store.block_size)
    layout = model_layout(model, config.store.block_size)
    namespace = model_namespace(
        model,
        layout,
        prefill_chunk=prefill_chunk,
        reuse=reuse,
        salt=salt,
        revision=revision,
        hash_name=config.store.hash,
    )
    return open_configured(config, layout, namespace)
