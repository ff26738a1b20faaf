"""What the front adds to a request that hits nothing.

    PYTHONPATH=.:PACKAGES python tests/bench/llamacpp/bench_front.py [--rounds 101]

PACKAGES is the folder that `make test-llamacpp` has made. Prompts of about 1000 tokens that have nothing in common, one
at a time, in turn straight at a server and through a front before it, so that what the machine does besides meets both.
The server answers at once and computes nothing, in a process of its own: its share is what a straight request takes,
and is taken off. The real llama-server tokenizes for the front, and then not for the request, whose prompt the front
hands on as tokens: what it takes for the one is measured by itself and added, what it saves by the other is taken off.
The bound is 5 ms (median); CPU time is that of front and client, less that of the client alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from kvstore.config.sections import Config
from kvstore.llamacpp.front import FrontSettings, LlamaFront
from kvstore.llamacpp.seat import LlamaSeat
from kvstore.llamacpp.server import LlamaServer
from tests.engines.llamacpp.front import Front
from tests.helpers.llama_server import FakeLlama

BOUND_MS = 5.0
WORDS = "the boats come in early "


def prompt_of(number: int) -> str:
    """About 1000 characters, and tokens of the server that computes nothing; no two begin alike."""
    return chr(1000 + number) + WORDS * 42


async def serve(folder: Path) -> None:
    """The server that computes nothing; prints its address."""
    server = await FakeLlama(folder).start()
    print(server.url, flush=True)
    await asyncio.Event().wait()


async def measure(url: str, folder: Path, rounds: int) -> float:
    """Print what the front adds before the server at `url`; the median in ms."""
    seat = LlamaSeat(
        LlamaServer(url, folder), Config(host={"capacity_bytes": 64 << 20, "huge_pages": False}), weights="sampled"
    )
    front = LlamaFront(FrontSettings(port=0), seat)
    await front.open()
    wall: dict[str, list[float]] = {url: [], front.site.url: []}
    cpu: dict[str, list[float]] = {url: [], front.site.url: []}
    async with aiohttp.ClientSession() as session:

        async def ask(base: str, number: int) -> None:
            async with session.post(base + "/v1/completions", json={"prompt": prompt_of(number)}) as answer:
                await answer.read()

        for number in range(rounds):
            for turn, base in enumerate(wall):
                began, began_cpu = time.perf_counter(), time.process_time()
                await ask(base, 2 * number + turn)
                wall[base].append((time.perf_counter() - began) * 1e3)
                cpu[base].append((time.process_time() - began_cpu) * 1e3)
                while seat.served.slots.num_free < 2:  # what is saved is saved behind the answer
                    await asyncio.sleep(0.001)
    await front.close()
    for what, values in (("wall", wall), ("CPU of front and client", cpu)):
        straight, fronted = values.values()
        print(
            f"{what}: straight {spread(straight)}, through the front {spread(fronted)}, "
            f"added {spread([b - a for a, b in zip(straight, fronted, strict=True)])}",
            flush=True,
        )
    return statistics.median(b - a for a, b in zip(*wall.values(), strict=True))


async def tokenizing(url: str, rounds: int) -> float:
    """Print what the real server takes for its part, which is to tokenize before the request; the median in ms.

    A prompt that its slot has already is asked for as text and as tokens in turn: the one less the other is saved.
    """
    times, saved = [], []
    async with aiohttp.ClientSession() as session:

        async def ask(path: str, body: dict[str, Any]) -> Any:
            began = time.perf_counter()
            async with session.post(url + path, json=body) as answer:
                found = await answer.json()
            return found, (time.perf_counter() - began) * 1e3

        for number in range(rounds):
            text = prompt_of(number) + WORDS * 125
            found, took = await ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
            times.append(took)
            if number % 10 == 0:
                asked = {"max_tokens": 1, "temperature": 0, "id_slot": 0, "cache_prompt": True}
                prompts = {"text": text, "tokens": found["tokens"]}
                await ask("/v1/completions", {**asked, "prompt": text})
            taken = {what: (await ask("/v1/completions", {**asked, "prompt": prompts[what]}))[1] for what in prompts}
            saved.append(taken["text"] - taken["tokens"])
    print(f"llama-server tokenizes {len(found['tokens'])} tokens in {spread(times)}", flush=True)
    print(f"and answers sooner, given tokens, by {spread(saved)}", flush=True)
    return statistics.median(times) - statistics.median(saved)


def spread(values: list[float]) -> str:
    """Quartiles in ms."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ms ({low:.2f} to {high:.2f})"


def child_url(front: Front) -> str:
    """The address of the llama-server behind a front."""
    command = Path(f"/proc/{front.child}/cmdline").read_text().split("\0")
    return f"http://127.0.0.1:{json.loads(command[-2])['port']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(arguments.serve))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--serve", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            own = asyncio.run(measure(url, folder, arguments.rounds))
            server.kill()
        front = Front(folder / "front.log")
        try:
            theirs = asyncio.run(tokenizing(child_url(front), arguments.rounds))
        finally:
            front.stop()
    added = own + theirs
    verdict = "within" if added <= BOUND_MS else "NOT within"
    print(f"a request that hits nothing takes {added:.2f} ms longer (median): {verdict} the bound of {BOUND_MS:.0f} ms")


if __name__ == "__main__":
    main()
