"""What sharing a cache between replicas is worth: topologies of `kvstore cluster` x workloads of `kvstore load`.

    python tests/bench/bench_cluster.py [--topology NAME ...] [--workload NAME ...] [--json FILE]

Each cell brings a cluster up, empty, plays one workload, and takes the cluster down. Two replicas everywhere:

    private       a node each, no Redis, round robin: what each computed is its own
    prefix        the same, and the router sends a prompt where most of it is cached
    redis         a node each, one Redis, round robin: two machines that share a server
    shared        one node for both, no Redis, round robin: two engines of one machine

`--workload` takes those of WORKLOADS, sized for two cores and SmolLM2-135M: the default takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.cluster.supervisor import brought_up, take_down
from kvstore.cluster.supervisor_directory import RunDirectory
from kvstore.cluster.topology import AUTO, NONE, ClusterSpec, ports_from
from kvstore.console import console, table
from kvstore.demo.models import resolve_model
from kvstore.lab.machine import machine, versions
from kvstore.ports import free_ports

REPLICAS = 2
# name -> nodes, Redis, policy of the router
TOPOLOGIES: dict[str, tuple[int, str, str]] = {
    "private": (2, NONE, "round-robin"),
    "prefix": (2, NONE, "prefix"),
    "redis": (2, AUTO, "round-robin"),
    "shared": (1, NONE, "round-robin"),
}
WORKLOADS: dict[str, tuple[str, ...]] = {
    "shared-prompt": ("--requests", "10", "--system-tokens", "1000", "--answer-tokens", "8"),
    "multi-round": ("--users", "3", "--rounds", "3", "--history-tokens", "500", "--answer-tokens", "16"),
    "no-reuse": ("--requests", "6", "--prompt-tokens", "1000", "--answer-tokens", "8"),
}
HOST_BYTES = "512MiB"


def run(topologies: Sequence[str], workloads: Sequence[str], model: str | None = None) -> dict[str, Any]:
    """A row per topology and workload, with the summary of `kvstore load`."""
    source = resolve_model(model).source
    rows = []
    for workload in workloads:
        for name in topologies:
            print(f"{workload} on {name}", file=sys.stderr, flush=True)
            rows.append({"topology": name, "workload": workload, "summary": play(name, workload, source)})
    return {"machine": machine(), "versions": versions(), "model": Path(source).name, "rows": rows}


def play(name: str, workload: str, source: str) -> dict[str, Any]:
    """One workload on one topology, from an empty cache. Raises CalledProcessError if a request fails."""
    nodes, redis, policy = TOPOLOGIES[name]
    with tempfile.TemporaryDirectory(prefix="kv-bench-", dir="/tmp") as parent:
        directory = RunDirectory(Path(parent), "bench")
        spec = ClusterSpec(
            model=source,
            ports=ports_from(free_ports(REPLICAS + nodes + 2), REPLICAS, nodes),
            name="bench",
            redis=redis,
            policy=policy,
            settings=(f"host.capacity_bytes={HOST_BYTES}",),
        )
        try:
            with brought_up(spec, directory):
                out = Path(parent) / "load.json"
                command = [sys.executable, "-m", "kvstore", "load", "--workload", workload, *WORKLOADS[workload]]
                command += ["--url", f"http://127.0.0.1:{spec.ports.router}", "--json", str(out)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                summary: dict[str, Any] = json.loads(out.read_text())["runs"][0]
        finally:
            take_down(directory)
    summary.pop("records", None)
    return summary


def show(result: dict[str, Any]) -> None:
    """The table: hit rate and TTFT side by side."""
    numbers = ("hit rate", "host", "redis", "TTFT p50", "TTFT p95", "tokens/s")
    output = table("workload", "topology", *numbers, right=numbers, title=f"{REPLICAS} replicas of {result['model']}")
    for row in result["rows"]:
        summary = row["summary"]
        hits = summary["all"]["hit_tokens"]
        output.add_row(
            row["workload"],
            row["topology"],
            f"{summary['all']['hit_rate']:.1%}",
            str(hits.get("host", 0)),
            str(hits.get("redis", 0)),
            f"{summary['ttft_s']['p50']:.2f} s",
            f"{summary['ttft_s']['p95']:.2f} s",
            f"{summary['output_tokens_per_s']:.1f}",
        )
    console().print(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["shared-prompt", "multi-round"])
    parser.add_argument("--model", help="directory, hub id or random; SmolLM2-135M")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = run(given.topology, given.workload, given.model)
    show(result)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
