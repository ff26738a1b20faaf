"""The model of a replica with its store, and the same model without: nothing of HTTP, of queues or of a demo.

The engine of `kvstore replica` and a replica of `kvstore demo` make one and say on which thread it runs. Importing it
costs nothing; constructing a `Runner` loads torch, transformers and the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from connectors.answers import AUTO
from connectors.transformers.loading import chat_ids, load_model
from kvstore.base import RequestOptions
from kvstore.config.sections import Config
from kvstore.prefix.fingerprint import fingerprint

if TYPE_CHECKING:
    from connectors.transformers.report import Found, Report
    from connectors.transformers.run import GenerationRun
    from kvstore.base import KVStore

WARM_UP_TAIL = 48  # tokens of a chunk that is not full
WARM_UP_NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The model that a replica computes with.

    source:        directory or hub id.
    name:          under which it is served; "" if it is not.
    dtype:         "float32", "bfloat16" or "float16".
    threads:       of torch; equal in all replicas that share pages.
    prefill_chunk: tokens per forward of a prompt. Hits end on its multiples: 256 computes some 11 % faster, 128 wastes
                   less of a short prompt (SmolLM2, two cores).
    reuse:         "exact" or "any", see docs/transformers.md.
    single_flight: of requests that miss the same prompt, one computes it and the others wait.
    save:          "auto", "all" or "prompt": which answers are saved with "any".
    """

    source: str
    name: str = ""
    dtype: str = "float32"
    threads: int = 1
    prefill_chunk: int = 128
    reuse: str = "exact"
    single_flight: bool = True
    save: str = AUTO


@dataclass(frozen=True, slots=True)
class Job:
    """A generation to be run.

    temperature: 0 is greedy.
    stop:        strings that end the answer.
    use_store:   False neither looks the prompt up nor saves it.
    finish_reason: why the answer will have ended, of whoever knows better; "" leaves it to the model.
    hints:       messages of KV hints about the prompt.
    """

    tokens: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    use_store: bool = True
    last_turn: bool = False
    finish_reason: str = ""
    options: RequestOptions = field(default_factory=RequestOptions)
    hints: tuple[object, ...] = ()


class Runner:
    """A model with its store, and the same model without.

    rendering: the fingerprint of how its tokenizer makes prompts of conversations; "" where it has no chat template.
    """

    def __init__(self, spec: ModelSpec, config: Config) -> None:
        """Load the model and open the store, or attach to the daemon. Takes seconds; raises what both raise."""
        from connectors.transformers import KVCacheModel, open_store_for
        from connectors.transformers.positions import max_tokens

        self.spec = spec
        self.model, self.tokenizer = load_model(spec.source, spec.dtype, spec.threads)
        self.rendering = rendering_of(self.tokenizer)
        self.store: KVStore = open_store_for(
            self.model, config, prefill_chunk=spec.prefill_chunk, reuse=spec.reuse, rendering=self.rendering
        )
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "prefill_chunk": spec.prefill_chunk}
        self.without_store: KVCacheModel = KVCacheModel(self.model, **options)
        self.with_store: KVCacheModel = KVCacheModel(
            self.model,
            self.store,
            reuse=spec.reuse,
            save=spec.save,
            load_deadline_s=config.store.load_deadline_s,
            single_flight=spec.single_flight,
            **options,
        )
        self.max_tokens = max_tokens(self.model.config)  # of prompt and answer together; None if the model does not say

    @property
    def saved_answers(self) -> str:
        """Which answers are saved, and why."""
        connector = self.with_store.connector
        return "" if connector is None else connector.answers.told

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of a conversation."""
        if isinstance(prompt, str):
            return [int(token) for token in self.tokenizer(prompt).input_ids]
        return chat_ids(self.tokenizer, prompt)

    def start(self, job: Job) -> GenerationRun:
        """Check a job; nothing is looked up or computed yet. Raises RequestError for what the model cannot do."""
        from connectors.transformers import Sampling

        model = self.with_store if job.use_store else self.without_store
        return model.start(
            job.tokens,
            job.max_new_tokens,
            sampling=Sampling(job.temperature, job.top_k, job.top_p, job.seed),
            stop=job.stop,
            eos=() if job.ignore_eos else None,
            options=job.options,
            last_turn=job.last_turn,
            finish_reason=job.finish_reason,
            hints=job.hints,
        )

    def lookup(self, job: Job) -> Found:
        """The part of a prompt that the tiers have; changes nothing and loads nothing."""
        return self.with_store.lookup(job.tokens, job.options)

    def warm_up(self) -> Report:
        """Compute a prompt that nobody asks, without the store, and then another; the report of that one.

        The first forwards of a process are slower than all later ones. The store learns the rate of the second prompt.
        """
        self.compute_unasked(WARM_UP_TAIL)
        report = self.compute_unasked()
        self.store.observe_prefill(report.computed_tokens, report.prefill_s)
        return report

    def compute_unasked(self, tail: int = 0) -> Report:
        """Compute a prompt that nobody asks, without the store: a whole chunk, and `tail` tokens more."""
        num_tokens = self.spec.prefill_chunk + tail
        if self.max_tokens is not None:
            num_tokens = max(1, min(num_tokens, self.max_tokens - WARM_UP_NEW_TOKENS))
        tokens = [(7 * i + 3) % len(self.tokenizer) for i in range(num_tokens)]
        return self.without_store.generate(tokens, WARM_UP_NEW_TOKENS, eos=()).report

    def close(self, timeout_s: float) -> None:
        """Finish saving, write behind what is left, close the store."""
        self.with_store.close()
        self.store.close(timeout_s)


def rendering_of(tokenizer: Any) -> str:
    """Return the fingerprint of how a tokenizer makes prompts of conversations; "" where it has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""

    def render(messages: Any, tools: Any) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )
        return str(text)

    return fingerprint(render, datetime.now())
