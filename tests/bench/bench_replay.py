"""Replay a trace through the planner under a virtual clock: hit rate and what planning costs per block.

    python tests/bench/bench_replay.py TRACE.kvt.zst --capacity 5 --policy lru --json out.json

The trace format is kvt1 (zstd, JSON lines): a request names an earlier one, the number of leading blocks it shares
with it, and its further blocks as [first id, count] runs. Capacity is a percentage of the trace's distinct blocks.
It is the very planner that runs in a store; only the bytes are missing: every page is "copied" at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eviction.registry import POLICIES, make_policy
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.plan.planner import Planner
from kvstore.plan.records import Request
from kvstore.plan.settings import PlanSettings
from radix.namespace import BlockHash

KEY_BYTES = 32


def read_trace(path: Path) -> tuple[dict[str, Any], Iterator[tuple[float, int, list[BlockHash]]]]:
    """The header of a trace, and its requests: time in seconds, prompt tokens, one key per full block."""
    import zstandard

    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"))
    lines = _lines(stream)
    header = json.loads(next(lines))
    if header.get("format") != "kvt1":
        raise SystemExit(f"{path}: the first line is no kvt1 header")

    def requests() -> Iterator[tuple[float, int, list[BlockHash]]]:
        paths: list[list[BlockHash]] = []
        for line in lines:
            fields = json.loads(line)
            shared = paths[fields["p"]][: fields["k"]] if fields["p"] >= 0 else []
            fresh = [
                BlockHash(number.to_bytes(KEY_BYTES, "big"))
                for first, count in fields["h"]
                for number in range(first, first + count)
            ]
            paths.append(shared + fresh)
            yield fields["t"], fields["in"], paths[-1]

    return header, requests()


def replay(path: Path, capacity_percent: float, policy: str) -> dict[str, Any]:
    """Play a whole trace; returns hit rate in tokens and planning cost."""
    header, requests = read_trace(path)
    played = list(requests)
    block_tokens = header["block_tokens"]
    distinct = len({key for _, _, keys in played for key in keys})
    slots = max(1, int(distinct * capacity_percent / 100))
    layout = Layout(block_tokens, (LayerGroup(GroupKind.FULL, (0,), 4096),), "replay", "uint8")
    planner = Planner(layout, PlanSettings(slots), make_policy(policy))
    hit_tokens = prompt_tokens = blocks = 0
    began = time.process_time()
    for number, (now, num_tokens, keys) in enumerate(played):
        # A block more than the prompt has: a trace's last block counts as a hit, where an engine would compute its
        # last token.
        request = Request(number, keys, (len(keys) + 1) * block_tokens)
        match = planner.lookup(request, now)
        if match.num_blocks:
            planner.complete(planner.prepare_load(request, match.num_blocks, now).id, now)
        planner.complete(planner.prepare_save(request, match.num_blocks, len(keys), now).id, now)
        planner.finished(request, now)
        hit_tokens += min(match.num_tokens, num_tokens)
        prompt_tokens += num_tokens
        blocks += len(keys)
    cpu_s = time.process_time() - began
    planner.check()
    return {
        "trace": header.get("name", path.name),
        "policy": policy,
        "capacity_percent": capacity_percent,
        "slots": slots,
        "requests": len(played),
        "blocks": blocks,
        "token_hit_rate": hit_tokens / prompt_tokens,
        "cpu_s": cpu_s,
        "us_per_block": cpu_s / blocks * 1e6,
        "requests_per_cpu_s": len(played) / cpu_s,
    }


def _lines(stream: Any) -> Iterator[str]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode()
    if rest.strip():
        yield rest.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="+")
    parser.add_argument("--capacity", type=float, nargs="+", default=[5.0], help="percent of the distinct blocks")
    parser.add_argument("--policy", nargs="+", default=["lru"], choices=sorted(POLICIES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for trace in arguments.trace:
        for policy in arguments.policy:
            for capacity in arguments.capacity:
                row = replay(trace, capacity, policy)
                rows.append(row)
                print(
                    f"{row['trace']:24} {policy:8} {capacity:5.1f} %  hits {100 * row['token_hit_rate']:5.1f} %  "
                    f"{row['us_per_block']:5.2f} us/block  {row['requests_per_cpu_s']:8.0f} requests/CPU-s",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
