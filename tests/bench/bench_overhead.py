"""What the store costs where it can win nothing: prompts that share no token, with host, disk and Redis tiers on.

    python tests/bench/bench_overhead.py [--model DIR] [--tokens 2048] [--rounds 7] [--json FILE]

Each round prefills one fresh random prompt without a store and another one with it, in turn. Counted are the CPU
seconds of the whole process until the pages are written behind to every tier, so nothing hides in a background thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np


def run(
    model_spec: str | None = None, num_tokens: int = 2048, rounds: int = 7, *, redis: bool = True
) -> dict[str, Any]:
    """Medians of CPU and wall seconds per prompt, with and without the store, and their ratio."""
    import torch
    from transformers import AutoModelForCausalLM

    from connectors.transformers import KVCacheModel
    from kvstore.config.sections import Config
    from kvstore.demo.models import resolve_model
    from kvstore.testing.redis_server import LocalRedis

    demo = resolve_model(model_spec)
    model = AutoModelForCausalLM.from_pretrained(demo.source, dtype=torch.bfloat16).eval()
    rng = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    times: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sections: dict[str, Any] = {"host": {"capacity_bytes": "1GiB"}, "disk": {"path": directory}}
        if redis:
            sections["redis"] = {"url": stack.enter_context(LocalRedis()).url}
        stored = stack.enter_context(KVCacheModel.open(model, Config(**sections)))
        plain = KVCacheModel(model)
        store = stored.connector._store  # type: ignore[union-attr]
        for number in range(rounds + 1):
            for name, engine in (("without", plain), ("with", stored)):
                prompt = rng.integers(0, vocabulary, num_tokens)
                wall, cpu = time.perf_counter(), time.process_time()
                report = engine.prefill(prompt).report
                ttft_s = time.perf_counter() - wall
                if engine is stored:
                    assert report.reused_tokens == 0
                    stored.flush(60.0)
                    store.flush(60.0)
                if number:  # the first round warms up
                    times[name].append((time.process_time() - cpu, ttft_s))
        stats = store.stats()
    cpu = {name: statistics.median(c for c, _ in rows) for name, rows in times.items()}
    wall = {name: statistics.median(w for _, w in rows) for name, rows in times.items()}
    paired = [w[0] / wo[0] for w, wo in zip(times["with"], times["without"], strict=True)]
    return {
        "model": demo.name,
        "prompt_tokens": num_tokens,
        "rounds": rounds,
        "cpu_s": cpu,
        "ttft_s": wall,
        "cpu_overhead": statistics.median(paired) - 1,
        "ttft_overhead": wall["with"] / wall["without"] - 1,
        "saved_pages": stats["saved_pages"],
        "spilled_pages": stats["spilled_pages"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-redis", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.model, arguments.tokens, arguments.rounds, redis=not arguments.no_redis)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
