"""Everything of ours that only a GPU can show, in one run of minutes: is it right there, and how fast.

    python tests/gpu/check.py [--device cuda] [--out FILE]      from the repository's root

Needs torch, numpy and xxhash, and triton for the kernel; the check of an engine also what the store and transformers
need. Prints one JSON: per check "ok", "failed" with its error, or "skipped" with its reason, and its figures. Exit code
1 if one has failed. `--device cpu` is a rehearsal: the same code at small sizes, whose figures mean nothing.

Checks, in order; one that has not begun after --seconds (240) is skipped, so that the whole ends within five minutes:

    contract      gather, scatter and refusals of the device, by the kernel, by torch operations, with little staging
    bandwidth     pages of engines' shapes to the host and back, over one copy of the same bytes in pinned memory
    overlap       the share of copying that is hidden behind computing, and by how much computing is slowed down
    transformers  a small model on the GPU: the same tokens cold, from host memory, and from disk in a store opened anew
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from kvstore.devices.cpu import CpuDevice
from kvstore.devices.cuda import CudaDevice
from kvstore.devices.tables import paged_table, token_table
from kvstore.tiers.host import HostSlab

GOAL = 0.9  # of one copy of the same bytes in pinned memory
SLOT_BYTES = 4096  # slots begin at multiples of it
KiB, MiB = 1 << 10, 1 << 20

# name: tensors, bytes of a run, heads (0: paged), pages of a call
SHAPES = {
    "8B, 16 tokens, paged: 64 runs of 32 KiB": (64, 32 * KiB, 0, 64),
    "MLA, 64 tokens, paged: 61 runs of 72 KiB": (61, 72 * KiB, 0, 32),
    "small, 16 tokens, paged: 64 runs of 4 KiB": (64, 4 * KiB, 0, 256),
    "contiguous cache, 64 tokens: 180 runs of 8 KiB": (60, 8 * KiB, 3, 64),
    "8B, one page a call": (64, 32 * KiB, 0, 1),
}


class Skipped(Exception):
    """A check that cannot be made here, with the reason."""


class Bench:
    """The device under test, and the sizes that its machine can bear."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        self.where = torch.device(device)
        self.rounds = 15 if self.is_gpu else 2
        self.shrink = 1 if self.is_gpu else 16  # pages of a call

    def open(self, **options: Any) -> Any:
        """The device that copies."""
        return CudaDevice(0, **options) if self.is_gpu else CpuDevice()

    def wait(self) -> None:
        """Until the GPU has nothing to do."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, ways: Sequence[Callable[[], object]]) -> list[float]:
        """The median time of each, taking turns; the first round warms up."""
        taken: list[list[float]] = [[] for _ in ways]
        for number in range(self.rounds + 1):
            for way, times in zip(ways, taken, strict=True):
                self.wait()
                start = time.perf_counter()
                way()
                self.wait()
                if number:
                    times.append(time.perf_counter() - start)
        return [median(times) for times in taken]


# ---- contract -------------------------------------------------------------------------------------------------------


def contract(bench: Bench) -> dict[str, Any]:
    """Right bytes at the right place, and nothing beside them."""
    ways = {"default": bench.open()}
    if bench.is_gpu:
        ways["small staging"] = bench.open(staging_bytes=30_000)
        ways["torch operations"] = bench.open()
        ways["torch operations"]._kernel = None
    for name, device in ways.items():
        with closing(device):
            for dtype, dim in ((torch.bfloat16, 64), (torch.uint8, 37), (torch.float32, 3), (torch.uint8, 1)):
                _paged(bench, device, dtype, dim, name)
                _tokens(bench, device, dtype, dim, name)
            _refusals(bench, device)
    kernel = "triton" if bench.is_gpu and ways["default"]._kernel is not None else "none"
    return {"ways": list(ways), "kernel": kernel}


def _random(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = np.random.default_rng(seed).integers(0, 250, shape)
    return torch.from_numpy(numbers).to(dtype).to(bench.where)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _paged(bench: Bench, device: Any, dtype: torch.dtype, dim: int, way: str) -> None:
    tensors = [_random(bench, (23, 5, dim), dtype, seed) for seed in (1, 2, 3)]
    before = [tensor.clone() for tensor in tensors]
    table = paged_table(tensors)
    ids = [22, 0, 7, 8, 9, 3]
    slots = [np.zeros(table.page_bytes + 8, np.uint8) for _ in ids]
    device.copy_out(table, ids, slots).wait()
    for page, slot in zip(ids, slots, strict=True):
        expected = b"".join(_bytes(tensor[page]) for tensor in tensors)
        _check(slot[: table.page_bytes].tobytes() == expected, f"{way}: gather of page {page}, {dtype} x {dim}")
        _check(not slot[table.page_bytes :].any(), f"{way}: gather wrote behind page {page}")
    targets = [5, 6, 1, 20, 11, 2]
    device.copy_in(table, targets, slots).wait()
    bench.wait()
    for tensor, old in zip(tensors, before, strict=True):
        expected_tensor = old.clone()
        expected_tensor[targets] = old[ids]
        _check(_bytes(tensor) == _bytes(expected_tensor), f"{way}: scatter, {dtype} x {dim}")


def _tokens(bench: Bench, device: Any, dtype: torch.dtype, dim: int, way: str) -> None:
    tensors = [_random(bench, (3, 33, dim), dtype, seed) for seed in (4, 5)]
    table = token_table(tensors, 4, offset_tokens=1)
    slots = [np.zeros(table.page_bytes, np.uint8) for _ in range(8)]
    device.copy_out(table, range(8), slots).wait()
    for page, slot in enumerate(slots):
        part = slice(1 + 4 * page, 5 + 4 * page)
        expected = b"".join(_bytes(tensor[:, part].contiguous()) for tensor in tensors)
        _check(slot.tobytes() == expected, f"{way}: gather of tokens, page {page}, {dtype} x {dim}")
    empty = [torch.zeros_like(tensor) for tensor in tensors]
    device.copy_in(token_table(empty, 4, offset_tokens=1), range(8), slots).wait()
    bench.wait()
    for tensor, copy in zip(tensors, empty, strict=True):
        _check(_bytes(copy[:, 1:]) == _bytes(tensor[:, 1:]), f"{way}: there and back, {dtype} x {dim}")
        _check(not copy[:, 0].any().item(), f"{way}: scatter wrote before the first page")


def _refusals(bench: Bench, device: Any) -> None:
    table = paged_table([_random(bench, (4, 8), torch.uint8, 0)])
    good = np.zeros(8, np.uint8)
    for ids, slots in (([4], [good]), ([-1], [good]), ([0], [good[:7]]), ([0, 1], [good])):
        try:
            device.copy_out(table, ids, slots)
        except ValueError:
            continue
        raise AssertionError(f"pages {ids} into {[slot.nbytes for slot in slots]} bytes were not refused")


# ---- bandwidth ------------------------------------------------------------------------------------------------------


def bandwidth(bench: Bench) -> dict[str, Any]:
    """GB/s of every shape, and the ratio to one copy of the same bytes."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = _bandwidth(bench, *shape)
    worst = min(min(one["out_ratio"], one["in_ratio"]) for one in found.values())
    return {"shapes": found, "goal": GOAL, "worst": worst}


def _bandwidth(bench: Bench, pieces: int, run_bytes: int, heads: int, pages: int) -> dict[str, float]:
    pages = max(1, pages // bench.shrink)
    num_blocks = 4 * pages
    shape = (heads, num_blocks, run_bytes) if heads else (num_blocks, run_bytes)
    tensors = [torch.ones(shape, dtype=torch.uint8, device=bench.where) for _ in range(pieces)]
    table = token_table(tensors, 1) if heads else paged_table(tensors)
    slot_bytes = -(-table.page_bytes // SLOT_BYTES) * SLOT_BYTES
    amount = pages * table.page_bytes
    rng = np.random.default_rng(0)
    on_gpu = torch.ones(amount, dtype=torch.uint8, device=bench.where)
    with ExitStack() as stack:
        slab = stack.enter_context(closing(HostSlab(num_blocks, slot_bytes)))
        device = stack.enter_context(closing(bench.open()))
        device.register(slab.buffer)
        pinned = torch.ones(amount, dtype=torch.uint8, pin_memory=bench.is_gpu)

        def some() -> tuple[list[int], list[Any]]:
            ids = rng.permutation(num_blocks)[:pages].tolist()
            return ids, [slab.array(slot) for slot in rng.permutation(num_blocks)[:pages].tolist()]

        out_s, in_s, bare_out_s, bare_in_s = bench.seconds(
            [
                lambda: device.copy_out(table, *some()).wait(),
                lambda: device.copy_in(table, *some()).wait(),
                lambda: pinned.copy_(on_gpu, non_blocking=True),
                lambda: on_gpu.copy_(pinned, non_blocking=True),
            ]
        )
    return {
        "bytes": amount,
        "out_gb_s": amount / out_s / 1e9,
        "in_gb_s": amount / in_s / 1e9,
        "bare_out_gb_s": amount / bare_out_s / 1e9,
        "bare_in_gb_s": amount / bare_in_s / 1e9,
        "out_ratio": bare_out_s / out_s,
        "in_ratio": bare_in_s / in_s,
    }


# ---- overlap --------------------------------------------------------------------------------------------------------


def overlap(bench: Bench) -> dict[str, Any]:
    """Saving and loading while the engine computes."""
    pieces, run_bytes, _, pages = next(iter(SHAPES.values()))
    pages = max(1, 4 * pages // bench.shrink)
    tensors = [torch.ones((pages, run_bytes), dtype=torch.uint8, device=bench.where) for _ in range(pieces)]
    table = paged_table(tensors)
    side = 8192 if bench.is_gpu else 256
    matrix = torch.ones((side, side), dtype=torch.bfloat16 if bench.is_gpu else torch.float32, device=bench.where)
    result = torch.empty_like(matrix)
    with ExitStack() as stack:
        slab = stack.enter_context(closing(HostSlab(pages, table.page_bytes)))
        device = stack.enter_context(closing(bench.open()))
        device.register(slab.buffer)
        slots = [slab.array(slot) for slot in range(pages)]
        ids = list(range(pages))

        def compute(times: int) -> None:
            for _ in range(times):
                torch.mm(matrix, matrix, out=result)

        (copying_s,) = bench.seconds([lambda: device.copy_out(table, ids, slots).wait()])
        (once_s,) = bench.seconds([lambda: compute(1)])
        times = max(1, round(2 * copying_s / once_s))  # computing takes twice as long as copying

        def both(copy: Callable[..., Any]) -> None:
            event = copy(table, ids, slots)
            compute(times)
            event.wait()

        computing_s, out_s, both_out_s, in_s, both_in_s = bench.seconds(
            [
                lambda: compute(times),
                lambda: device.copy_out(table, ids, slots).wait(),
                lambda: both(device.copy_out),
                lambda: device.copy_in(table, ids, slots).wait(),
                lambda: both(device.copy_in),
            ]
        )
    return {
        "computing_s": computing_s,
        "out_s": out_s,
        "in_s": in_s,
        "hidden_out": (computing_s + out_s - both_out_s) / min(out_s, computing_s),
        "hidden_in": (computing_s + in_s - both_in_s) / min(in_s, computing_s),
        "slowed_by_out": both_out_s / computing_s - 1,
        "slowed_by_in": both_in_s / computing_s - 1,
    }


# ---- an engine ------------------------------------------------------------------------------------------------------


def transformers(bench: Bench) -> dict[str, Any]:
    """Equal tokens, and the time to the first one."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        from connectors.transformers import KVCacheModel
        from connectors.transformers.model import open_store_for
        from kvstore.config.sections import Config
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from None
    torch.manual_seed(0)
    shape = (1024, 16, 16, 8, 2816) if bench.is_gpu else (64, 2, 4, 2, 128)
    hidden, layers, heads, kv_heads, mlp = shape
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
        initializer_range=0.08,  # the greedy choice is no tie that rounding decides
    )
    dtype = torch.bfloat16 if bench.is_gpu else torch.float32
    model = LlamaForCausalLM(config).to(dtype).to(bench.where).eval()
    num_tokens, chunk = (4096, 512) if bench.is_gpu else (256, 64)
    prompt = np.random.default_rng(0).integers(0, 512, num_tokens + 1)

    def answer(engine: Any) -> tuple[list[int], int]:
        said = engine.generate(prompt, 16)
        return [int(token) for token in said.tokens], int(said.report.reused_tokens)

    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-gpu-"))
        settings = Config(
            store={"block_size": 64},
            host={"capacity_bytes": "1GiB" if bench.is_gpu else "16MiB"},
            disk={"path": directory, "capacity_bytes": "1GiB" if bench.is_gpu else "16MiB"},
        )
        plain = stack.enter_context(KVCacheModel(model, prefill_chunk=chunk))
        expected, _ = answer(plain)
        found = {}
        for name in ("cold", "from host memory", "from disk"):
            if name != "from host memory":  # a store of its own, on the same directory
                store = stack.enter_context(open_store_for(model, settings, prefill_chunk=chunk))
                engine = stack.enter_context(KVCacheModel(model, store, prefill_chunk=chunk))
            bench.wait()
            start = time.perf_counter()
            tokens, reused = answer(engine)
            found[name] = {"seconds": time.perf_counter() - start, "reused_tokens": reused}
            _check(tokens == expected, f"{name}: other tokens than without a store")
            _check(reused >= num_tokens - chunk or name == "cold", f"{name}: only {reused} tokens were reused")
            engine.flush(60.0)
            store.flush(60.0)
            if name == "from host memory":
                engine.close()
                store.close()
    return {"prompt_tokens": num_tokens, "layers": layers, "answers": found}


CHECKS: tuple[Callable[[Bench], dict[str, Any]], ...] = (contract, bandwidth, overlap, transformers)


def run(device: str, seconds: float) -> dict[str, Any]:
    """Make all checks and say what came out."""
    start = time.monotonic()
    bench = Bench(device)
    results: dict[str, Any] = {}
    for check in CHECKS:
        began = time.monotonic()
        if began - start > seconds:
            results[check.__name__] = {"status": "skipped", "reason": f"{seconds:g} s are over"}
            continue
        try:
            result = {"status": "ok", **check(bench)}
        except Skipped as reason:
            result = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # the checks that follow still tell something
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        results[check.__name__] = {**result, "seconds": round(time.monotonic() - began, 2)}
    return {"machine": _machine(bench), "checks": results}


def _machine(bench: Bench) -> dict[str, Any]:
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(bench.where),
    }
    if bench.is_gpu:
        about |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    return about


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=240.0, help="after which no further check begins")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu rehearses")
    text = json.dumps(run(options.device, options.seconds), indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return int(any(check["status"] == "failed" for check in json.loads(text)["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
