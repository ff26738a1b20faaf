"""SGLang's own `file` backend beside ours: 512 pages stored, and read back with a cold page cache, in turn, in one run.

    .ci/test-sglang python -m tests.bench.sglang_hicache /nvme/somewhere [--layout page_first] [--rounds 5]

Both are called as SGLang's storage controller calls them: batches of 128 pages, `file` by copies through flat pages and
ours by `batch_set_v1` and `batch_get_v1`, with checksums. Before each read, what was written is synced and dropped from
the page cache; the bytes read from the device say whether that worked. Ratios are of one round, medians of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE, HiCacheFile
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from tests.engines.sglang.backends import attached, chain, on_disk, storage_config

PAGE, LAYERS, HEADS, HEAD_DIM = 32, 32, 4, 64  # 1 MiB a page
MiB, GiB = 1 << 20, 1 << 30
Result = dict[str, float]


def host_pool(layout: str, num_pages: int) -> Any:
    """A pool of `num_pages` pages, of random bytes."""
    tokens = num_pages * PAGE
    device = MHATokenToKVPool(
        size=PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    pool = MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=tokens,
        start_layer=0,
        end_layer=LAYERS,
    )
    pool.kv_buffer.view(torch.int16).random_(0, 1 << 14)
    return pool


class FileBackend:
    """SGLang's `file`, called as its controller does without `interface_v1`."""

    def __init__(self, pool: Any, path: Path) -> None:
        self.pool = pool
        self.storage = HiCacheFile(storage_config({"file_storage_path": str(path)}))

    def save(self, keys: list[str], indices: torch.Tensor) -> bool:
        """Store a batch."""
        pages = [self.pool.get_data_page(indices[i * PAGE]) for i in range(len(keys))]
        return bool(self.storage.batch_set(keys, pages))

    def load(self, keys: list[str], indices: torch.Tensor) -> bool:
        """Fetch a batch."""
        targets = [self.pool.get_dummy_flat_data_page() for _ in keys]
        pages = self.storage.batch_get(keys, targets)
        for i, page in enumerate(pages):
            if page is None:
                return False
            self.pool.set_from_flat_data_page(indices[i * PAGE], page)
        return True


class OurBackend:
    """Ours, by the zero-copy calls."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def save(self, keys: list[str], indices: torch.Tensor) -> bool:
        """Store a batch."""
        return all(self.storage.batch_set_v1(keys, indices))

    def load(self, keys: list[str], indices: torch.Tensor) -> bool:
        """Fetch a batch."""
        return all(self.storage.batch_get_v1(keys, indices))


def drop_cache(path: Path) -> None:
    """Write everything below `path` out, and drop it from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def read_from_device() -> int:
    """Bytes that this process has had read from a device so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def measure(call: Callable[[list[str], torch.Tensor], bool], keys: list[str], num_bytes: int) -> Result:
    """GB/s, CPU seconds per GiB and device bytes of all pages, in batches as SGLang's."""
    indices = torch.arange(len(keys) * PAGE)
    device, cpu, began = read_from_device(), time.process_time(), time.perf_counter()
    for start in range(0, len(keys), STORAGE_BATCH_SIZE):
        some = keys[start : start + STORAGE_BATCH_SIZE]
        if not call(some, indices[start * PAGE : (start + len(some)) * PAGE]):
            raise SystemExit("a page was not stored, or not found again")
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {
        "gb_per_s": num_bytes / seconds / 1e9,
        "cpu_s_per_gib": cpu_s * GiB / num_bytes,
        "device_read_share": (read_from_device() - device) / num_bytes,
    }


def one_round(backend: Any, pool: Any, path: Path, keys: list[str]) -> dict[str, Result]:
    """Save, the time until it is on the device, cold and warm reads; the bytes are compared."""
    num_bytes = pool.kv_buffer.nbytes * len(keys) // (pool.size // PAGE)
    expected = pool.kv_buffer.clone()
    saved = measure(backend.save, keys, num_bytes)
    began = time.perf_counter()
    drop_cache(path)
    seconds = num_bytes / saved["gb_per_s"] / 1e9 + time.perf_counter() - began
    pool.kv_buffer.zero_()
    cold = measure(backend.load, keys, num_bytes)
    kept = pool.kv_buffer.view(torch.int16)
    exact = bool((kept == expected.view(torch.int16)).float().mean() >= len(keys) * PAGE / pool.size - 1e-6)
    warm = measure(backend.load, keys, num_bytes)
    pool.kv_buffer.copy_(expected)
    if not exact:
        raise SystemExit("what was read is not what was written")
    return {"save": saved, "save_synced": {"gb_per_s": num_bytes / seconds / 1e9}, "cold": cold, "warm": warm}


def run(root: Path, layout: str, num_pages: int, rounds: int) -> dict[str, Any]:
    """All rounds of both, in turn."""
    pool, results = host_pool(layout, num_pages), {"file": [], "kvstore": []}
    for number in range(rounds):
        keys = chain(num_pages, seed=number)
        for name in ("file", "kvstore") if number % 2 else ("kvstore", "file"):
            path = Path(tempfile.mkdtemp(dir=root, prefix=f"{name}-"))
            try:
                if name == "file":
                    results[name].append(one_round(FileBackend(pool, path), pool, path, keys))
                    continue
                extra = on_disk(path)
                extra["disk"]["capacity_bytes"] = 2 * num_pages * MiB
                with attached(pool, extra) as storage:
                    results[name].append(one_round(OurBackend(storage), pool, path, keys))
            finally:
                shutil.rmtree(path, ignore_errors=True)
    return results


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians of both, and of the ratios of each round."""
    told: dict[str, Any] = {}
    for step in ("save", "save_synced", "cold", "warm"):
        told[step] = {
            name: {unit: statistics.median(one[step][unit] for one in rounds) for unit in rounds[0][step]}
            for name, rounds in results.items()
        }
        pairs = list(zip(results["kvstore"], results["file"], strict=True))
        ratios = [ours[step]["gb_per_s"] / theirs[step]["gb_per_s"] for ours, theirs in pairs]
        told[step]["speed_ratio"] = {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
        if "cpu_s_per_gib" in pairs[0][0][step]:
            told[step]["cpu_ratio"] = statistics.median(
                ours[step]["cpu_s_per_gib"] / theirs[step]["cpu_s_per_gib"] for ours, theirs in pairs
            )
    return told


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a directory on the disk to measure")
    parser.add_argument("--layout", default="page_first", help="SGLang's --hicache-mem-layout")
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.path.mkdir(parents=True, exist_ok=True)
    # `file` copies by torch, whose threads spin where others want the processors too: with two of them on two busy
    # cores it took five times the processor time. One thread is its best case.
    torch.set_num_threads(1)
    results = run(args.path, args.layout, args.pages, args.rounds)
    told = {
        "layout": args.layout,
        "pages": args.pages,
        "page_bytes": 2 * PAGE * LAYERS * HEADS * HEAD_DIM * 2,
        "rounds": args.rounds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        **summary(results),
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
