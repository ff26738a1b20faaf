"""TTFT of a vLLM engine on CPU: cold, its own prefix cache, and ours from host memory, disk and Redis.

    $VENV/bin/python -m tests.bench.vllm.bench_ttft [--lengths 1024,4096,8192] [--reps 3] [--out ttft.json]

One engine in one process, random prompts, one token each, so that a call takes about its TTFT. Rows of a length are
taken in turn, so that ratios compare like with like; medians, CPU seconds of the process beside wall seconds. The model
has random weights (Llama, 16 layers, 8 KV heads of 64, bfloat16: 32 KiB per token), about 200M parameters.

`no_reuse` is cold with saving to host memory, `cold` is vLLM without a connector, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvstore.tiers.redis_local import LocalRedis
from tests.engines.vllm.engine import ENVIRONMENT, Engine, make_prompt
from tests.engines.vllm.models import make_model

GiB = 1 << 30
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def main() -> None:
    """Measure and print one JSON object."""
    options = argparse.ArgumentParser()
    options.add_argument("--lengths", default="1024,4096,8192")
    options.add_argument("--reps", type=int, default=3)
    options.add_argument("--block", type=int, default=128)
    options.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "kvstore-bench-llama"))
    options.add_argument("--out")
    options.add_argument("--plain", action="store_true", help="vLLM without us; what the other process runs")
    given = options.parse_args()
    os.environ.update({**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"})
    lengths = [int(length) for length in given.lengths.split(",")]
    make_model(Path(given.model), "gqa", **SHAPE)
    if given.plain:
        print("PLAIN " + json.dumps(plain(given, lengths)), flush=True)
        return
    result = {"machine": {"load": os.getloadavg(), "cpus": os.cpu_count()}, "block": given.block, "reps": given.reps}
    command = [sys.executable, "-m", "tests.bench.vllm.bench_ttft", *sys.argv[1:], "--plain"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    cold = json.loads(next(line for line in lines if line.startswith("PLAIN ")).removeprefix("PLAIN "))
    result["lengths"] = ours(given, lengths, cold)
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        Path(given.out).write_text(text)


def plain(given: argparse.Namespace, lengths: list[int]) -> dict[str, Any]:
    """vLLM alone: cold and its own cache."""
    engine = open_engine(given, lengths, None)
    rows: dict[str, Any] = {}
    for length in lengths:
        times: dict[str, list[dict[str, Any]]] = {"cold": [], "own_cache": []}
        for rep in range(given.reps):
            prompt = make_prompt(length + 5, 1000 * rep + length)
            times["cold"].append(engine.ask(prompt, 1))
            times["own_cache"].append(engine.ask(prompt, 1))
        rows[str(length)] = {name: medians(samples) for name, samples in times.items()}
    engine.close()
    return rows


def ours(given: argparse.Namespace, lengths: list[int], cold: dict[str, Any]) -> dict[str, Any]:
    """With the connector: saving, and loading from each tier in turn the only one."""
    rows: dict[str, Any] = {}
    with LocalRedis() as redis, tempfile.TemporaryDirectory() as folder:
        extra = {
            "host": {"capacity_bytes": GiB},
            "store": {"load_or_recompute": False, "load_deadline_s": 30, "lookup_deadline_s": 5},
        }
        tiers = {
            "host": {},
            "disk": {"disk": {"path": folder, "capacity_bytes": 2 * GiB, "shared": False}},
            "redis": {"redis": {"url": redis.url, "timeout_s": 30}},
        }
        for tier, section in tiers.items():
            engine = open_engine(given, lengths, {**extra, **section})
            for length in lengths:
                row = rows.setdefault(str(length), dict(cold[str(length)]))
                times: dict[str, list[dict[str, Any]]] = {"no_reuse": [], "own_cache_again": [], tier: []}
                for rep in range(given.reps):
                    prompt = make_prompt(length + 5, 1000 * rep + length)
                    times["no_reuse"].append(engine.ask(prompt, 1))
                    engine.settle()
                    times["own_cache_again"].append(engine.ask(prompt, 1))
                    drop(engine, keep_host=tier == "host")
                    times[tier].append(engine.ask(prompt, 1))
                    assert times[tier][-1]["cached"] >= length // given.block * given.block
                names = ("no_reuse", "own_cache_again", tier) if tier == "host" else (tier,)
                row.update({name: medians(times[name]) for name in names})
            connector = engine.scheduler.connector
            rows.setdefault("hooks_us_per_step", {})[tier] = 1e6 * connector._hook_seconds / max(1, connector._steps)
            engine.close()
    for length in lengths:
        row = rows[str(length)]
        for name in ("own_cache", "host", "disk", "redis", "no_reuse"):
            row[name]["over_cold"] = {kind: row[name][kind] / row["cold"][kind] for kind in ("wall_s", "cpu_s")}
        row["host"]["over_own_cache"] = {
            kind: row["host"][kind] / row["own_cache_again"][kind] for kind in ("wall_s", "cpu_s")
        }
    return rows


def open_engine(given: argparse.Namespace, lengths: list[int], extra: dict[str, Any] | None) -> Engine:
    """An engine that has answered once already."""
    engine = Engine(given.model, extra, block_size=given.block, max_model_len=max(lengths) + 256, max_num_seqs=2)
    engine.ask(make_prompt(300, 7), 2)
    return engine


def drop(engine: Engine, *, keep_host: bool) -> None:
    """Empty vLLM's own cache and, where asked for, host memory; the lower tiers keep their pages."""
    engine.forget_own_cache()
    if keep_host:
        return
    store = engine.half.store
    with store._lock:
        pages = [page for page in store._planner.catalog.pages() if getattr(page.state, "name", "") == "READY"]
        for page in pages:
            store._planner.host.drop((page,))


def medians(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of wall and CPU seconds."""
    return {kind: round(statistics.median(sample[kind] for sample in samples), 4) for kind in ("wall_s", "cpu_s")}


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"# {time.monotonic() - started:.0f} s", file=sys.stderr)
