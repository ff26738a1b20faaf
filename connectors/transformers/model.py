"""transformers with a store behind it: `KVCacheModel` generates text and computes only what no tier has.

    model = KVCacheModel.open(AutoModelForCausalLM.from_pretrained(...), Config.load(), tokenizer=tokenizer)
    answer = model.generate("...", max_new_tokens=64)
    print(answer.text, answer.report.sources)       # {"host": 1024, "disk": 0, "redis": 0, "computed": 57}

Without a store it is the same code with the same prefill chunks: the cold run that hits are compared with. One prompt
at a time; for batches there are vLLM and SGLang. Any thread may call; each call has its own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from connectors.answers import AUTO
from connectors.transformers.answers import saved_answers
from connectors.transformers.check import check_engine, is_proven
from connectors.transformers.connector import TransformersConnector
from connectors.transformers.forward import Forward
from connectors.transformers.identity import Reuse, check_chunk, check_reuse, model_namespace
from connectors.transformers.layout import model_layout, new_cache
from connectors.transformers.report import Found, Generation, Piece, Prefill, Report
from connectors.transformers.run import GenerationRun, PromptRun
from connectors.transformers.states import StatePlan, cold_plan
from connectors.transformers.text import Sampler, Sampling, TextStream
from kvstore.base import KVStore, RequestOptions
from kvstore.errors import RequestError, UnsupportedModel
from kvstore.forks import forbid, harmless
from kvstore.requests import check_reason
from radix.tokens import TokenArray

if TYPE_CHECKING:
    from kvstore.config.sections import Config

__all__ = [
    "Found",
    "Generation",
    "GenerationRun",
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


class KVCacheModel:
    """A causal LM of transformers whose prompts are looked up in a store, and saved there.

    store:         opened for this model (see `open_store_for`); stays the caller's. None computes everything.
    tokenizer:     for prompts and stop strings given as text, and for text in the answer.
    prefill_chunk: tokens per forward of a prompt, a multiple of the block size. With reuse="exact" hits end on its
                   multiples.
    reuse:         "exact": logits are bit-equal to a run without a store; "any": finer hits, equal up to rounding.
    save:          with "any", of which answers blocks are saved, too: "all", "prompt" (none), or "auto": of those that
                   the next turn can begin with, by the tokenizer's chat template (of all, if it has none).
    load_deadline_s: longest wait for the pages of a hit; None takes the store's own (see `TransformersConnector`).
    single_flight: a prompt that another request is computing is waited for instead of computed again (see
                   `TransformersConnector`).
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
        save: str = AUTO,
        load_deadline_s: float | None = None,
        single_flight: bool = False,
        self_check: bool | None = None,
    ) -> None:
        check_chunk(prefill_chunk, store.layout.block_size if store is not None else 1)
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_chunk = prefill_chunk
        self._forward = Forward(model)
        self._states: StatePlan | None = None
        if store is None and check_reuse(reuse) is Reuse.ANY:
            self._states = cold_plan(model, prefill_chunk)  # as with a store: its forwards are to be the same
        self._owned_store: KVStore | None = None
        self.connector: TransformersConnector | None = None
        if store is not None:
            if self_check or (self_check is None and not is_proven(model)):
                check_engine(model).require()
            self.connector = TransformersConnector(
                model,
                store,
                prefill_chunk=prefill_chunk,
                reuse=reuse,
                answers=saved_answers(save, check_reuse(reuse), tokenizer),
                load_deadline_s=load_deadline_s,
                single_flight=single_flight,
            )
            self._states = self.connector.states
            forbid(self)  # the store is its parent's in a forked child, and the thread that saves is not there

    @classmethod
    def open(
        cls,
        model: Any,
        config: Config,
        *,
        tokenizer: Any = None,
        prefill_chunk: int = 256,
        reuse: Reuse | str = Reuse.EXACT,
        save: str = AUTO,
        single_flight: bool | None = None,
        salt: str = "",
        revision: str | None = None,
        self_check: bool | None = None,
    ) -> KVCacheModel:
        """Open a store for `model` and own it: `close` closes both. single_flight: None takes `store.single_flight`."""
        store = open_store_for(model, config, prefill_chunk=prefill_chunk, reuse=reuse, salt=salt, revision=revision)
        try:
            opened = cls(
                model,
                store,
                tokenizer=tokenizer,
                prefill_chunk=prefill_chunk,
                reuse=reuse,
                save=save,
                load_deadline_s=config.store.load_deadline_s,
                single_flight=config.store.single_flight if single_flight is None else single_flight,
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
        import torch

        run = self._prompt_run(self._ids(prompt), options, max_new_tokens=1)
        for _ in run.load():
            pass  # it may block, so there is nothing to do in between
        try:
            kept = list(run.chunks(all_logits=all_logits))
            logits = torch.cat(kept, dim=1) if all_logits else kept[-1]
            run.first_token_known()
        finally:
            run.end("prefill", last_turn=False)
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
        """Generate an answer; each piece is handed to `on_piece` as it comes. For the arguments see `start`."""
        run = self.start(
            prompt, max_new_tokens, sampling=sampling, stop=stop, eos=eos, options=options, last_turn=last_turn
        )
        for piece in run:
            if on_piece is not None:
                on_piece(piece)
        return run.result

    def start(
        self,
        prompt: Any,
        max_new_tokens: int = 64,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        options: RequestOptions | None = None,
        last_turn: bool = False,
        finish_reason: str = "",
        hints: Sequence[object] = (),
    ) -> GenerationRun:
        """Generate piece by piece: iterate over the run, or drive it by its `step`.

        prompt:    text (needs a tokenizer) or token ids: any flat sequence, array, buffer or tensor, or a batch of one.
        sampling:  greedy if None.
        stop:      strings that end the answer and are not part of it (needs a tokenizer).
        eos:       token ids that end the answer; None takes the model's own.
        last_turn: no further prompt will continue this one; its pages may go first.
        finish_reason: why the answer will have ended, where the caller knows better than this class ("tool_use"); it
                   counts where the answer ends by itself.
        hints:     messages of KV hints about this prompt, see docs/hints.md; `report.outcomes` has what became of them.

        Raises RequestError at once for bad arguments; nothing is computed before the first piece is asked for.
        """
        tokens = self._ids(prompt, max_new_tokens)
        if stop and self.tokenizer is None:
            raise RequestError("stop: strings need a tokenizer; pass one at construction or use eos=")
        text = TextStream(self.tokenizer, stop) if self.tokenizer is not None else None
        return GenerationRun(
            self._prompt_run(tokens, options, max_new_tokens, hints),
            max_new_tokens,
            Sampler(sampling or Sampling()),
            self._end_ids(eos),
            text,
            last_turn=last_turn,
            told_reason=check_reason(finish_reason),
        )

    def lookup(self, prompt: Any, options: RequestOptions | None = None) -> Found:
        """The part of a prompt that the tiers have, for routers. Computes and loads nothing."""
        tokens = self._ids(prompt)
        if self.connector is None or self.connector.bypass_reason():
            return Found(len(tokens))
        return Found(len(tokens), self.connector.loads.find(tokens, options))

    def forget(self, prompt: Any, options: RequestOptions | None = None) -> int:
        """Delete the prompt's blocks and all that continue them, in every tier that can be reached."""
        if self.connector is None:
            return 0
        return self.connector.forget(self.connector.named(self._ids(prompt), options))

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was saved so far can be found by the next request; False if the time ran out."""
        return self.connector is None or self.connector.saves.flush(timeout_s)

    @harmless
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

    def _prompt_run(
        self, tokens: TokenArray, options: RequestOptions | None, max_new_tokens: int, hints: Sequence[object] = ()
    ) -> PromptRun:
        connector, chunk, ropes = self.connector, self.prefill_chunk, self._forward.ropes
        if ropes is not None and len(tokens) + max_new_tokens > ropes.border:
            # Its positions are encoded by its length: computed in one piece, as transformers does, and kept to itself.
            connector, chunk = None, len(tokens)
            if ropes.restarts is None and len(tokens) <= ropes.border < len(tokens) + max_new_tokens - 1:
                raise RequestError(
                    f"max_new_tokens: {len(tokens)} tokens and {max_new_tokens} new ones cross {ropes.border}, from "
                    f"where this model encodes positions in another way; at most {ropes.border - len(tokens) + 1} work"
                )
        states, num_tokens = self._states, len(tokens)

        def stops(branch: int) -> Sequence[int]:
            """The places of states where this prompt ends, and where it parts from a stored one."""
            return () if states is None else states.stops(num_tokens, branch)

        return PromptRun(self._forward, connector, lambda: new_cache(self.model), tokens, chunk, options, hints, stops)


def open_store_for(
    model: Any,
    config: Config,
    *,
    prefill_chunk: int = 256,
    reuse: Reuse | str = Reuse.EXACT,
    salt: str = "",
    revision: str | None = None,
    rendering: str = "",
) -> KVStore:
    """Open the configured tiers, or attach to the configured daemon, for the pages of `model` under its namespace.

    rendering: the fingerprint of how chats become prompts here, for the daemon's operators.
    """
    from kvstore.opening import open_configured

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
    return open_configured(config, layout, namespace, rendering=rendering)
