"""TTFT of vLLM engines on CPU: cold, vLLM's own prefix cache, its native fs tier, and ours from host, disk and Redis.

    $VENV/bin/python -W ignore -m tests.bench.vllm.bench_ttft [--lengths 1024,4096,8192] [--reps 3] [--out ttft.json]
    ... --quick                                  less than three minutes: 1024 tokens, two turns
    ... --engines host --lengths 1024 --reps 15  one question, many pairs

One engine per way (ttft_engine.py says which, and what their rows are), each in a process of its own; all are alive at
once and take turns, length by length, so that ratios compare like with like. Random prompts, one token each: a call
takes about its TTFT. The model has random weights (Llama, 16 layers, 8 KV heads of 64, bfloat16: 32 KiB per token),
about 200M parameters. Rows are printed as they come, and `--out` holds all of them after each one, so that nothing is
lost when the time is up.

Both disks are below one folder. Ours and vLLM's fs tier read with O_DIRECT where the file system has it (the `facts` of
the engines say so), past the page cache; it is dropped all the same before `load`, and filled before `load_warm`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvstore.lab.machine import machine, versions
from kvstore.testing.redis_server import LocalRedis
from tests.bench.vllm.ttft_report import TtftReport
from tests.engines.vllm.engine import ENVIRONMENT
from tests.engines.vllm.models import make_model

GiB = 1 << 30
ENGINES = ("host", "disk", "redis", "fs", "tier")
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


def main() -> None:
    """Measure, print, and say which goals were met."""
    given = parse_arguments()
    os.environ.update({**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the engines and Redis end too
    make_model(Path(given.model), "gqa", **SHAPE)
    facts: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "given": {name: value for name, value in vars(given).items() if name != "out"},
        "engines": {},
    }
    report = TtftReport(facts, Path(given.out) if given.out else None)
    started = time.monotonic()
    with ExitStack() as stack:
        redis_url = stack.enter_context(LocalRedis(maxmemory_bytes=GiB)).url if "redis" in given.engines else ""
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder))
        pipes = {kind: start_engine(stack, given, kind, folder, redis_url) for kind in given.engines}
        for kind, pipe in pipes.items():
            facts["engines"][kind] = pipe.recv()["facts"]
            print(f"# {kind} is ready after {time.monotonic() - started:.0f} s {facts['engines'][kind]}", flush=True)
        for rep in range(given.reps):
            for length in given.lengths:
                for kind, pipe in pipes.items():
                    take_turn(report, kind, pipe, length, rep)
    report.print_summary()
    print(f"# {time.monotonic() - started:.0f} s")


def parse_arguments() -> argparse.Namespace:
    """The command line; lists are comma-separated."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--lengths", default="1024,4096,8192", help="prompt tokens")
    options.add_argument("--reps", type=int, default=3, help="turns of each engine at each length")
    options.add_argument("--hits", type=int, default=3, help="loads per turn")
    options.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)}")
    options.add_argument("--block", type=int, default=128, help="tokens per block; vLLM's default on CPU is 128")
    options.add_argument("--folder", help="where both disks lie; default: the directory for temporary files")
    options.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "kvstore-bench-llama"))
    options.add_argument("--out", help="JSON file, written after every row")
    options.add_argument("--quick", action="store_true", help="1024 tokens, two turns")
    given = options.parse_args()
    if given.quick:
        given.lengths, given.reps, given.hits = "1024", 2, 2
    given.lengths = [int(length) for length in given.lengths.split(",")]
    given.engines = given.engines.split(",")
    for engine in given.engines:
        if engine not in ENGINES:
            options.error(f"--engines: there is no {engine!r}; known are {', '.join(ENGINES)}")
    return given


def start_engine(
    stack: ExitStack, given: argparse.Namespace, kind: str, folder: str, redis_url: str
) -> Connection[Any, Any]:
    """Start an engine's process and return our end of its pipe; it ends when that is closed."""
    from tests.bench.vllm.ttft_engine import EngineSettings, serve

    settings = EngineSettings(kind, given.model, given.block, max(given.lengths), given.hits, folder, redis_url)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, settings), name=f"ttft-{kind}")
    process.start()
    theirs.close()
    stack.callback(process.join, 60)
    stack.callback(ours.close)
    return ours


def take_turn(report: TtftReport, kind: str, pipe: Connection[Any, Any], length: int, rep: int) -> None:
    """Let one engine measure one length, and book its rows as they come."""
    pipe.send((length, rep))
    while (row := pipe.recv()) is not None:
        report.add({"length": length, "rep": rep, "engine": kind, **row})


if __name__ == "__main__":
    main()
