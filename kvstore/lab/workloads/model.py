"""A real model where the store can win nothing: prompts that share no token, and hits on a tier that is slow.

The ceiling is the model without a store. "all tiers on" counts until the pages are written behind to host memory, disk
and, if a redis-server is installed, Redis, so that nothing hides in a background thread: its CPU seconds over the
ceiling's are what the store costs. On the slow tier the rule "loading must pay" (`store.load_or_recompute`) should keep
a hit from being slower than computing; the same without the rule shows what it is for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from eviction.registry import make_policy
from kvstore.config.sections import Config
from kvstore.errors import ConfigError
from kvstore.extras import how_to_install, missing
from kvstore.lab.bench import Case, Table, measure
from kvstore.move.lane import Lane
from kvstore.page import PageKey, PageMeta
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings
from kvstore.plan.tier_plan import TierPlan
from kvstore.store import LocalStore
from kvstore.testing.redis_server import LocalRedis, RedisNotInstalled
from kvstore.tiers.host import HostSlab
from kvstore.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from connectors.transformers import KVCacheModel

NUM_TOKENS = 1024
BLOCK_SIZE = 64
PREFILL_CHUNK = 256
DELAY_S = 2.0  # of every read of the slow tier
HOST_BYTES = "1GiB"
DISK_BYTES = "1GiB"
TIMEOUT_S = 60.0


def run(argument: str, quick: bool) -> list[Table]:
    """Measure the model `argument`: what `kvstore demo --model` takes, or "default" for the demo's own.

    Raises ConfigError if transformers is missing or there is no such model.
    """
    absent = missing("transformers")
    if absent:
        raise ConfigError(f"bench model needs {', '.join(absent)}; {how_to_install('transformers')}")
    from transformers import AutoModelForCausalLM

    from kvstore.demo.models import resolve_model

    found = resolve_model(None if argument == "default" else argument)
    model = AutoModelForCausalLM.from_pretrained(found.source, dtype="float32").eval()
    return [_nothing_shared(model, quick), _slow_tier(model, quick)]


def _nothing_shared(model: Any, quick: bool) -> Table:
    from connectors.transformers import KVCacheModel
    from connectors.transformers.model import open_store_for

    rng = np.random.default_rng(0)
    prompt: list[Any] = []

    def draw() -> None:
        prompt[:] = [rng.integers(0, model.config.vocab_size, NUM_TOKENS)]

    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-bench-"))
        sections: dict[str, Any] = {
            "store": {"block_size": BLOCK_SIZE},
            "host": {"capacity_bytes": HOST_BYTES},
            "disk": {"path": directory, "capacity_bytes": DISK_BYTES},
        }
        with suppress(RedisNotInstalled):
            sections["redis"] = {"url": stack.enter_context(LocalRedis()).url}
        store = open_store_for(model, Config(**sections), prefill_chunk=PREFILL_CHUNK)
        stack.callback(store.close)
        stored = stack.enter_context(KVCacheModel(model, store, prefill_chunk=PREFILL_CHUNK))
        plain = stack.enter_context(KVCacheModel(model, prefill_chunk=PREFILL_CHUNK))

        def prefill_and_store() -> None:
            if stored.prefill(prompt[0]).report.reused_tokens:
                raise RuntimeError("bench model: a prompt of chance was found in the store")
            stored.flush(TIMEOUT_S)
            store.flush(TIMEOUT_S)

        cases = [
            Case("without a store", lambda: plain.prefill(prompt[0]), NUM_TOKENS, draw),
            Case(
                f"with {', '.join([*sections][1:])}, until all is written behind", prefill_and_store, NUM_TOKENS, draw
            ),
        ]
        return measure(f"prompts of {NUM_TOKENS} tokens that share nothing", "tokens", cases, quick=quick)


class _SlowTier(MemoryTier):
    """A tier whose reads take `delay_s` longer."""

    delay_s = 0.0

    def read_into(
        self, keys: Sequence[PageKey], views: Sequence[memoryview], metas: Sequence[PageMeta], *, timeout_s: float
    ) -> list[bool]:
        time.sleep(self.delay_s)
        return super().read_into(keys, views, metas, timeout_s=timeout_s)


def _slow_tier(model: Any, quick: bool) -> Table:
    from connectors.transformers import KVCacheModel

    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, NUM_TOKENS + 1) for _ in range(2)]
    with ExitStack() as stack:
        plain = stack.enter_context(KVCacheModel(model, prefill_chunk=PREFILL_CHUNK))
        cases = [Case("computed", _in_turns(plain, prompts), NUM_TOKENS)]
        for pays, name in ((True, "a hit on it, loading must pay"), (False, "a hit on it, without that rule")):
            store, tier = _store_over_slow_tier(model, pays)
            engine = stack.enter_context(KVCacheModel(model, stack.enter_context(store), prefill_chunk=PREFILL_CHUNK))

            def asked(engine: KVCacheModel = engine, store: LocalStore = store) -> None:
                engine.flush(TIMEOUT_S)
                store.flush(TIMEOUT_S)

            ask = _in_turns(engine, prompts)
            for _ in prompts:
                ask()
                asked()
            tier.delay_s = DELAY_S
            cases.append(Case(name, ask, NUM_TOKENS, asked))
        return measure(f"{NUM_TOKENS} tokens on a tier whose reads take {DELAY_S:g} s", "tokens", cases, quick=quick)


def _store_over_slow_tier(model: Any, pays: bool) -> tuple[LocalStore, _SlowTier]:
    """A store whose host memory holds one prompt, so that another one leaves it."""
    from connectors.transformers import model_layout, model_namespace

    layout = model_layout(model, BLOCK_SIZE)
    num_pages = NUM_TOKENS // BLOCK_SIZE
    tier = _SlowTier(4 * num_pages, layout.slot_bytes)
    slab = HostSlab(num_pages, layout.slot_bytes)
    settings = PlanSettings(num_pages, load_or_recompute=pays, load_deadline_s=TIMEOUT_S)
    below = TierPlan(tier.name, tier.capacity_pages, make_policy("lru"), is_indexed=True, is_shared=False)
    planner = Planner(layout, settings, make_policy("lru"), [below])
    lane = Lane(tier, slab.view, workers=1, timeout_s=TIMEOUT_S)
    return LocalStore(layout, model_namespace(model, layout, prefill_chunk=PREFILL_CHUNK), planner, slab, [lane]), tier


def _in_turns(engine: KVCacheModel, prompts: Sequence[Any]) -> Callable[[], object]:
    """Return what computes the prompts one after the other, one a call."""
    turns = cycle(prompts)
    return lambda: engine.prefill(next(turns))
