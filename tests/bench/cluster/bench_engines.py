"""Tokens a second at 1, 2, 4 and 8 clients, of two engines, in turn on one machine.

    PYTHONPATH=. python tests/bench/cluster/bench_engines.py [--engines transformers vllm] [--clients 1 2 4 8]

One replica of each engine, each with a daemon of its own, both in float32 with the same number of threads. At each
number of clients first one engine is asked, then the other, so that what the machine does besides meets both. The
workload is `shared-prompt`; its seed differs at each step, so each begins with a system prompt that nobody has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KVSTORE = [sys.executable, "-m", "kvstore"]


def cluster(folder: Path, engine: str, command: str, *options: str) -> None:
    """One command about the cluster of an engine."""
    line = [*KVSTORE, "cluster", command, "--name", engine, "--directory", str(folder), *options]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def play(port: int, clients: int, seed: int, asked: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The summary of one run."""
    line = [*KVSTORE, "load", "--url", f"http://127.0.0.1:{port}", "--json", str(file), "--seed", str(seed)]
    line += ["--requests", str(max(asked.requests, 2 * clients)), "--concurrency", str(clients), "--warmup", "1"]
    line += ["--system-tokens", str(asked.system_tokens), "--answer-tokens", str(asked.answer_tokens)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())["runs"][0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--model", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--system-tokens", type=int, default=200)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=18800)
    parser.add_argument("--start-timeout", type=float, default=900.0)
    asked = parser.parse_args()
    ports = {engine: asked.port + 10 * number for number, engine in enumerate(asked.engines)}
    with tempfile.TemporaryDirectory(prefix="kv-be-", dir="/tmp") as name:
        folder = Path(name)
        try:
            for engine, port in ports.items():
                options = ["--engine", engine, "--replicas", "1", "--redis", "none", "--port", str(port), "--detach"]
                options += ["--threads", str(asked.threads), "--start-timeout", str(asked.start_timeout)]
                options += ["--set", "host.capacity_bytes=512MiB"]
                cluster(folder, engine, "up", *options, *(["--model", asked.model] if asked.model else []))
            print("| clients | engine | output tokens/s | time per token p50, p95, s | TTFT p50, s | hit rate |")
            print("|---|---|---|---|---|---|")
            for seed, clients in enumerate(asked.clients):
                for engine, port in ports.items():
                    one = play(port, clients, seed, asked, folder / "run.json")
                    token, ttft = one["token_s"], one["ttft_s"]
                    print(
                        f"| {clients} | {engine} | {one['output_tokens_per_s']:.2f} | {token['p50']:.3f}, "
                        f"{token['p95']:.3f} | {ttft['p50']:.2f} | {one['all']['hit_rate']:.0%} |",
                        flush=True,
                    )
        finally:
            for engine in ports:
                cluster(folder, engine, "down")


if __name__ == "__main__":
    main()
