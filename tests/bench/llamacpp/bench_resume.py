"""Resuming a prompt after a restart of llama-server, against reading it again; and what the front adds to a miss.

    PYTHONPATH=.:PACKAGES python tests/bench/llamacpp/bench_resume.py [--tokens 1024 4096 7680] [--rounds 9]

PACKAGES is the folder that `make test-llamacpp` has made. One thread. Seconds are those of one request, for one token:
cold, then with the front, its store's host memory and llama-server started anew, from disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from kvstore.config.sections import Config
from kvstore.llamacpp.front import FrontSettings, LlamaFront
from kvstore.llamacpp.seat import LlamaSeat
from kvstore.llamacpp.server import LlamaServer
from tests.engines.llamacpp.front import Front
from tests.helpers.llama_server import FakeLlama


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Random tokens, so that no two prompts have a head in common."""
    return [int(token) for token in np.random.default_rng(seed).integers(1000, 40000, num_tokens)]


def post(url: str, body: dict[str, Any]) -> float:
    """Seconds of one request."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=3600) as answer:
        answer.read()
    return time.perf_counter() - began


def resume(folder: Path, sizes: list[int]) -> None:
    """Print the table of resuming."""
    options = ("--set", f"disk.path={folder}/disk", "--set", "disk.capacity_bytes=1GiB", "--context", "8192")
    prompts = {size: prompt_of(size, size) for size in sizes}
    front = Front(folder / "before.log", *options)
    cold = {size: front.ask(prompts[size], 1) for size in sizes}  # type: ignore[arg-type]
    written = front.stats()["store"]["lane_bytes"]["disk"]["spill"]
    front.stop()
    print(f"bytes written to disk for each token: {written / sum(size // 16 * 16 for size in sizes):.0f} or more")
    print("| tokens | computed, s | resumed, s | ratio | restored | same text |")
    print("|---|---|---|---|---|---|")
    front = Front(folder / "after.log", *options)
    for size in sizes:
        warm = front.ask(prompts[size], 1)  # type: ignore[arg-type]
        ratio = cold[size].seconds / warm.seconds
        same = warm.text == cold[size].text
        where = f"{warm.restored} from {warm.by_tier} ({warm.effect})"
        print(
            f"| {size} | {cold[size].seconds:.2f} | {warm.seconds:.3f} | {ratio:.0f} | {where} | {same} |", flush=True
        )
    front.stop()


def heads(folder: Path, rounds: int) -> None:
    """Print how many pages ten prompts with a common head take."""
    front = Front(folder / "heads.log")
    tokenizing(front, rounds)
    head = prompt_of(512, 1)
    for number in range(10):
        front.ask(head + prompt_of(64, 100 + number), 1)  # type: ignore[arg-type]
    pages = front.stats()["saved_pages"]
    print(f"ten prompts of 576 tokens, 512 in common: {pages} pages of 16 tokens; apart they would be {10 * 36}")
    front.stop()


async def overhead(folder: Path, rounds: int) -> None:
    """Print what the front adds to a miss of 1000 tokens, before a server that computes nothing, both in this loop."""
    folder.mkdir()
    server = await FakeLlama(folder).start()
    config = Config(host={"capacity_bytes": 64 << 20, "huge_pages": False})
    seat = LlamaSeat(LlamaServer(server.url, folder), config, weights="sampled")
    front = LlamaFront(FrontSettings(port=0), seat)
    await front.open()
    times: dict[str, list[float]] = {server.url: [], front.site.url: []}
    cpus: dict[str, list[float]] = {url: [] for url in times}
    async with aiohttp.ClientSession() as session:
        for number in range(rounds):
            for url in times:
                first = chr(1000 + 2 * number + (url == server.url))  # no two prompts begin alike
                body = {"prompt": first + "the boats come in early " * 42}
                began, cpu = time.perf_counter(), time.process_time()
                async with session.post(url + "/v1/completions", json=body) as answer:
                    await answer.read()
                times[url].append(time.perf_counter() - began)
                cpus[url].append(time.process_time() - cpu)
                while seat.served.slots.num_free < 2:
                    await asyncio.sleep(0.001)
    await front.close()
    await server.stop()
    for what, values in (("wall", times), ("CPU of both", cpus)):
        without, with_front = (statistics.median(one) * 1e3 for one in values.values())
        print(f"a miss of 1000 tokens, {what}: server {without:.2f} ms, with front {with_front:.2f} ms", flush=True)


def tokenizing(front: Front, rounds: int) -> None:
    """Print what the real server takes for its part of that: a front asks it for the tokens."""
    body = {"content": "The boats come in early. " * 170, "add_special": True, "parse_special": True}
    times = [post(front.url + "/tokenize", body) * 1e3 for _ in range(rounds)]
    print(f"/tokenize of about 1000 tokens, through the front: {statistics.median(times):.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 7680])
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(overhead(Path(name) / "slots", arguments.rounds))
        heads(Path(name), arguments.rounds)
        resume(Path(name), arguments.tokens)


if __name__ == "__main__":
    main()
