"""A real model over a tier made slow on purpose: its hits must not make time to first token worse than cold.

    python tests/bench/bench_slow_tier.py [--model DIR] [--tokens 1024] [--delay 2.0] [--json FILE]

The same prompt again and again, forgotten by host memory each time, so that every hit would come from the slow tier;
once with the rule "loading must pay" and once without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np


def run(model_spec: str | None = None, num_tokens: int = 1024, delay_s: float = 2.0, rounds: int = 8) -> dict[str, Any]:
    """TTFT of a cold run, and of hits on the slow tier with and without the rule."""
    import torch
    from transformers import AutoModelForCausalLM

    from connectors.transformers import KVCacheModel, model_layout, model_namespace
    from eviction.registry import make_policy
    from kvstore.demo.models import resolve_model
    from kvstore.move.lane import Lane
    from kvstore.plan.planner import Planner
    from kvstore.plan.records import PlanSettings
    from kvstore.plan.tier_plan import TierPlan
    from kvstore.store import LocalStore
    from kvstore.tiers.host import HostSlab
    from kvstore.tiers.memory import MemoryTier
    from tests.helpers.faulty_tier import FaultyTier

    demo = resolve_model(model_spec)
    model = AutoModelForCausalLM.from_pretrained(demo.source, dtype=torch.bfloat16).eval()
    block_size, chunk = 64, 256
    layout = model_layout(model, block_size)
    namespace = model_namespace(model, layout, prefill_chunk=chunk)
    prompts = [np.random.default_rng(seed).integers(0, model.config.vocab_size, num_tokens + 8) for seed in range(2)]
    cold = KVCacheModel(model)
    cold.prefill(prompts[0])
    result: dict[str, Any] = {"model": demo.name, "prompt_tokens": len(prompts[0]), "delay_s": delay_s}
    result["cold_ttft_s"] = statistics.median(cold.prefill(prompts[n % 2]).report.ttft_s for n in range(4))
    for rule in (True, False):
        tier = FaultyTier(MemoryTier(256, layout.slot_bytes))
        slots = num_tokens // block_size  # one prompt fills host memory, so that the other one leaves it
        slab = HostSlab(slots, layout.slot_bytes)
        planner = Planner(
            layout,
            PlanSettings(slots, load_or_recompute=rule, load_deadline_s=60.0),
            make_policy("lru"),
            [TierPlan("memory", 256, make_policy("lru"), is_indexed=True, is_shared=False)],
        )
        with LocalStore(layout, namespace, planner, slab, [Lane(tier, slab.view, workers=1, timeout_s=60.0)]) as store:
            engine = KVCacheModel(model, store, prefill_chunk=chunk, load_deadline_s=60.0)
            times, reused = [], []
            for number in range(rounds):
                if number == 2:
                    tier.slow_down(delay_s)
                report = engine.prefill(prompts[number % 2]).report
                times.append(report.ttft_s)
                reused.append(report.reused_tokens)
                engine.flush(60.0)
                store.flush(60.0)
            tier.recover()
            engine.close()
        name = "with_rule" if rule else "without_rule"
        result[name] = {
            "ttft_s": times,
            "reused_tokens": reused,
            "median_after_learning_s": statistics.median(times[4:]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--delay", type=float, default=2.0, help="seconds added to every call of the tier")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.model, arguments.tokens, arguments.delay)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
