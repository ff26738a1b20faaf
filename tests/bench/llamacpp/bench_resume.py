"""Resuming a prompt after a restart of llama-server, against reading it again. (What a front adds: bench_front.py.)

    PYTHONPATH=.:PACKAGES python tests/bench/llamacpp/bench_resume.py [--tokens 1024 4096 7680]

PACKAGES is the folder that `make test-llamacpp` has made. One thread. Seconds are those of one request, for one token:
cold, then with the front, its store's host memory and llama-server started anew, from disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from tests.engines.llamacpp.front import Front


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Random tokens, so that no two prompts have a head in common."""
    return [int(token) for token in np.random.default_rng(seed).integers(1000, 40000, num_tokens)]


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


def heads(folder: Path) -> None:
    """Print how many pages ten prompts with a common head take."""
    front = Front(folder / "heads.log")
    head = prompt_of(512, 1)
    for number in range(10):
        front.ask(head + prompt_of(64, 100 + number), 1)  # type: ignore[arg-type]
    pages = front.stats()["saved_pages"]
    print(f"ten prompts of 576 tokens, 512 in common: {pages} pages of 16 tokens; apart they would be {10 * 36}")
    front.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 7680])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        heads(Path(name))
        resume(Path(name), arguments.tokens)


if __name__ == "__main__":
    main()
