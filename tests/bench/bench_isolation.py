"""What `service.isolate` costs: saves and loads through two daemons in turns, one as it comes and one that isolates.

    python -m tests.bench.bench_isolation [--json FILE] [--rounds 21] [--page-kib 2048]

Both verbs copy as connectors do, in one call. Ratios are medians over rounds; CPU ms per GB are those of the client and
of its daemon, which copies what is saved once more where it isolates.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.lab.bench import Case, Table, measure
from kvstore.lab.machine import machine, versions
from kvstore.layout import GroupKind, LayerGroup, Layout
from kvstore.service.client.connect import connect
from kvstore.units import KiB
from radix.namespace import Namespace
from tests.bench import bench_service_bytes as service

ROUNDS = 21
DAEMONS = {
    "shared": (),
    "isolated": ("service.isolate=true", f"service.isolate_bytes={2 * service.BATCH_BYTES}"),
}


def run(*, page_kib: int, rounds: int) -> dict[str, Any]:
    """Measure pages of `page_kib` KiB."""
    page_bytes = page_kib * KiB
    layout = Layout(service.BLOCK, (LayerGroup(GroupKind.FULL, (0,), page_bytes),), "bench", "uint8")
    namespace = Namespace("bench", "1", "uint8", layout.fingerprint, service.BLOCK)
    engine = service.Engine(page_bytes)
    saves: list[Case] = []
    loads: list[Case] = []
    with ExitStack() as stack:
        for name, settings in DAEMONS.items():
            capacity = (service.NUM_BATCHES + 1) * service.BATCH_BYTES
            url, process = stack.enter_context(service.daemon_process(capacity, *settings))
            store = stack.enter_context(connect(url, layout, namespace, call_timeout_s=service.TIMEOUT_S))
            client = service.Client(store, engine.num_pages)
            save, load = partial(client.save, engine.gather), partial(client.load, engine.scatter)
            saves.append(Case(name, save, service.BATCH_BYTES, client.new_prompt, process))
            loads.append(Case(name, load, service.BATCH_BYTES, client.new_prompt, process))
        title = f"{engine.num_pages} pages of {page_kib} KiB"
        tables: list[Table] = [
            measure(f"save {title}", "bytes", saves, rounds=rounds),
            measure(f"load {title}", "bytes", loads, rounds=rounds),
        ]
    return {"machine": machine(), "versions": versions(), "tables": [service.as_dict(table) for table in tables]}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--page-kib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    result = run(page_kib=arguments.page_kib, rounds=arguments.rounds)
    service.show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
