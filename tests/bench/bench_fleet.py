"""Hit rate, computed tokens and the load of the shared tier, from 8 to 64 replicas, by simulation.

    python tests/bench/bench_fleet.py TRACE[@FIRST_S]... [--span-s 150] [--json FILE] [--plot FILE]

Copies of a trace's window from FIRST_S on are served, as many as give the replicas BUSY of what they could compute
without a store. The first third of the span is a warm-up: only what comes after it counts. The model is Llama-3-8B's
geometry (128 KiB a token), a replica one H100 at 25,000 tokens/s; it has 64 GiB of host memory and 256 GiB below, of
its own or in the pool.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.cluster.routing import SHARED_WORTH
from kvstore.lab.fleet import PD, PREFIX, ROUND_ROBIN, Fleet, FleetPlan, FleetTotals, copies_of
from kvstore.lab.setup import PREFILL_TOKENS_PER_S
from kvstore.lab.traces import ReplayTrace, read_trace

BUSY = 0.7
TOKEN_BYTES = 128 * 1024
HOST_BYTES, LOWER_BYTES = 64 << 30, 256 << 30
BIN_S = 10
SHARD_GBPS = 2.8  # one Redis shard behind 25 GbE, as in kvstore/lab/hardware.py
KINDS = {  # routing, whether there is a pool, and what the router takes a token of the pool for
    "round robin, own disks": (ROUND_ROBIN, False, SHARED_WORTH),
    "prefix, own disks": (PREFIX, False, SHARED_WORTH),
    "round robin, pooled": (ROUND_ROBIN, True, SHARED_WORTH),
    "prefix, pooled, all alike": (PREFIX, True, 1.0),
    "prefix, pooled": (PREFIX, True, SHARED_WORTH),
    "pd, pooled, all alike": (PD, True, 1.0),
    "pd, pooled": (PD, True, SHARED_WORTH),
}
COLORS = ("#9a9a9a", "#7a52a8", "#56b4e9", "#b8420b", "#e0a030", "#5c6b2f", "#a0b060")


def main() -> None:
    """Print the table; write the records, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--replicas", default="8,16,32,64")
    parser.add_argument("--span-s", type=float, default=150.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    sizes = [int(size) for size in args.replicas.split(",")]
    records = []
    for word in args.traces:
        path, _, first_s = word.partition("@")
        trace = read_trace(Path(path))
        for size in sizes:
            for kind in KINDS:
                records.append(play(trace, kind, size, float(first_s or 0), args.span_s))
                print(line_of(records[-1]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(records, indent=1))
    if args.plot:
        draw(records, args.plot)


def play(trace: ReplayTrace, kind: str, num_replicas: int, first_s: float, span_s: float) -> dict[str, Any]:
    """Serve the copies of a window by a fleet; return its figures."""
    routing, is_pooled, shared_worth = KINDS[kind]
    block_bytes = trace.block_tokens * TOKEN_BYTES
    room = HOST_BYTES // block_bytes, LOWER_BYTES // block_bytes
    plan = FleetPlan(num_replicas, routing, is_pooled, *room, shared_worth)
    window = [r for r in trace.requests if first_s <= r.at_s < first_s + span_s]
    offered = sum(r.num_prompt_tokens for r in window) / span_s
    num_copies = max(1, round(BUSY * num_replicas * PREFILL_TOKENS_PER_S / offered))
    fleet, began, counts_from = Fleet(trace.block_tokens, plan), time.thread_time(), span_s / 3
    is_warm = False
    for request in copies_of(trace, num_copies, first_s, span_s):
        if not is_warm and request.at_s >= counts_from:
            fleet.totals, is_warm = FleetTotals(), True
        fleet.serve(request)
    totals = fleet.totals
    bins = np.zeros((2, int(span_s - counts_from) // BIN_S))
    if fleet.shared is not None:
        for row, by_second in zip(bins, (fleet.shared.read, fleet.shared.written), strict=True):
            for second, num in by_second.items():
                at = (second - int(counts_from)) // BIN_S
                if 0 <= at < len(row):
                    row[at] += num * block_bytes / BIN_S / 1e9
    load = bins.sum(axis=0)
    return {
        "trace": trace.name,
        "kind": kind,
        "replicas": num_replicas,
        "copies": num_copies,
        "requests": totals.requests,
        "hit_rate": (totals.host + totals.lower) / totals.prompt,
        "host_rate": totals.host / totals.prompt,
        "computed_tokens_per_s": totals.computed / (span_s - counts_from),
        "read_gbps": float(bins[0].mean()),
        "written_gbps": float(bins[1].mean()),
        "p95_gbps": float(np.percentile(load, 95)),
        "imbalance": fleet.prefill.imbalance,
        "cpu_s": time.thread_time() - began,
    }


def line_of(record: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{record['trace'][:12]:12} {record['replicas']:3} {record['kind']:22} hit {100 * record['hit_rate']:5.1f} % "
        f"(host {100 * record['host_rate']:4.1f})  computed {record['computed_tokens_per_s'] / 1000:7.1f} k/s  "
        f"read {record['read_gbps']:6.2f}, written {record['written_gbps']:6.2f}, p95 {record['p95_gbps']:6.2f} GB/s "
        f"= {record['p95_gbps'] / SHARD_GBPS:4.1f} shards  busiest {record['imbalance']:.2f}x  {record['cpu_s']:.0f} s"
    )


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Two panels for each trace: hit rate, and the load of the shared tier beside what shards of it carry."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(record["trace"] for record in records))
    figure = Figure(figsize=(10.4, 4 * len(traces)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), trace in zip(figure.subplots(len(traces), 2, squeeze=False), traces, strict=True):
        sizes = sorted({r["replicas"] for r in records if r["trace"] == trace})
        for kind, color in zip(KINDS, COLORS, strict=True):
            of_kind = [r for r in records if r["trace"] == trace and r["kind"] == kind]
            at = [r["replicas"] for r in of_kind]
            left.plot(at, [100 * r["hit_rate"] for r in of_kind], marker="o", color=color, label=kind)
            if KINDS[kind][1]:
                right.plot(at, [r["p95_gbps"] for r in of_kind], marker="o", color=color, label=kind)
        right.set_yscale("log", base=2)
        low, high = right.get_ylim()
        for shards in (1, 2, 4, 8, 16, 32, 64, 128):
            if low < shards * SHARD_GBPS < high:
                right.axhline(shards * SHARD_GBPS, color="#cccccc", zorder=0)
                word = f"{shards} shard{'s' * (shards > 1)}"
                right.text(sizes[-1], shards * SHARD_GBPS, word, fontsize=8, color="#777777", ha="right", va="bottom")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set(title=f"{trace}: prompt tokens that are hits, %", ylim=(0, None))
        right.set(title="load of the shared tier, GB/s, 95th percentile of 10 s")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xlabel("replicas; the traffic grows with them")
            axes.legend(frameon=False, fontsize=8)
            axes.grid(color="#eeeeee", zorder=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
