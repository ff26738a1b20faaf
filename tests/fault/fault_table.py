"""Plays every fault on a store in use and prints what was seen.

    python -m tests.fault.fault_table [--json] [--only TEXT]

A few threads make requests all the time, while the fault strikes, lasts until it has been felt, and is lifted. Latency
is that of the slowest call: `lookup` and `load` against their deadlines, `other` (prepare_load, prepare_save, complete,
finished), which never wait for a tier.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.engine import Engine, Tally
from tests.fault.faults import FAULTS, LOAD_DEADLINE_S, LOOKUP_DEADLINE_S, PROMPTS, Fault, Scene, Stats, hits

MIN_REQUESTS = 40  # during the fault and again after it, in tests
TABLE_REQUESTS = 500  # ... and in the table
FELT_WITHIN_S = 60.0  # of a busy machine
HEALED_WITHIN_S = 60.0
WAITS = ("wait_lookup", "wait")  # the calls that may wait; all others answer at once
COUNTERS = (
    "corrupt_pages",
    "lost_pages",
    "load_failures",
    "spill_failures",
    "spill_lost",
    "lane_refused",
)


@dataclass(slots=True)
class Seen:
    """What one fault did.

    slowest_ms:  the slowest call by name, from the strike to the end; `before_ms` the same without a fault.
    is_felt:     what the fault is known by was seen; `healed_s` after its lifting the tier served again, None if never.
    counters:    how much each counter grew.
    leaks:       threads, file handles or slots left over after the store was closed.
    """

    fault: str
    tier: str
    opens_breaker: bool
    is_lifted: bool
    requests: int = 0
    right: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    loaded_blocks: int = 0
    computed_blocks: int = 0
    slowest_ms: dict[str, float] = field(default_factory=dict)
    before_ms: dict[str, float] = field(default_factory=dict)
    is_felt: bool = False
    breaker_opened: int = 0
    healed_s: float | None = None
    counters: dict[str, int] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)

    @property
    def slowest_other_ms(self) -> float:
        return max((ms for name, ms in self.slowest_ms.items() if name not in WAITS), default=0.0)


def play(fault: Fault, directory: Path, requests: int = MIN_REQUESTS) -> Seen:
    """Let one fault happen to a store in use, in an empty directory, for at least so many requests."""
    seen = Seen(fault.name, fault.tier, fault.opens_breaker, fault.is_lifted)
    fds = _open_files()
    with ExitStack() as stack:
        scene = fault.open(stack, directory)
        engine = Engine(scene.store, PROMPTS, tokens_per_s=fault.tokens_per_s)
        opened = scene.store.stats()
        engine.start()
        try:
            tally = _play(fault, scene, engine, seen, opened, requests)
        finally:
            engine.stop()
        seen.leaks += _held(scene.store)
    seen.leaks += [f"thread {t.name}" for t in threading.enumerate() if t.name.startswith("kvstore-")]
    gc.collect()
    if _open_files() > fds:
        seen.leaks.append(f"{_open_files() - fds} file handles")
    seen.requests, seen.right, seen.wrong, seen.errors = tally.requests, tally.right, tally.wrong, tally.errors
    seen.loaded_blocks, seen.computed_blocks = tally.loaded_blocks, tally.computed_blocks
    seen.slowest_ms = _ms(tally)
    return seen


def _play(fault: Fault, scene: Scene, engine: Engine, seen: Seen, opened: Stats, requests: int) -> Tally:
    store, before = scene.store, opened
    if not fault.from_start:
        assert engine.run(lambda: hits(fault.tier)(opened, store.stats()), requests=requests), "no hit to begin with"
        seen.before_ms, before = _ms(engine.tally), store.stats()
        engine.begin()
    tally = engine.tally
    scene.strike()
    seen.is_felt = engine.run(
        lambda: scene.seen(before, store.stats()), requests=requests, limit_s=FELT_WITHIN_S, each=scene.each
    )
    scene.lift()
    lifted, lifted_at = store.stats(), time.monotonic()
    if fault.is_lifted and engine.run(lambda: scene.healed(lifted, store.stats()), limit_s=HEALED_WITHIN_S):
        seen.healed_s = time.monotonic() - lifted_at
    engine.run(requests=requests)
    after = store.stats()
    seen.breaker_opened = after["breaker_opens"][fault.tier] - before["breaker_opens"][fault.tier]
    counts = [(_counts(stats, fault.tier)) for stats in (before, after)]
    seen.counters = {name: n for name in counts[0] if (n := counts[1][name] - counts[0][name])}
    return tally


def _counts(stats: Stats, tier: str) -> dict[str, int]:
    counts = {name: stats[name][tier] for name in COUNTERS}
    counts["lane_errors"] = stats["lane_errors"][tier]["all"]
    return counts | {"skipped_saves": stats["skipped_saves"], "not_worth": stats["cut"]["not_worth"]}


def _held(store: Any) -> list[str]:
    """Slots that are neither free nor resident once all leases have ended and all transfers have come back."""
    until = time.monotonic() + 60.0
    while True:
        store.check()
        stats = store.stats()
        slots = stats["slots"]
        if not slots["filling"] and not stats["leases"]:
            break
        if time.monotonic() > until:
            return [f"slots {slots}, {stats['leases']} leases"]
        time.sleep(0.02)
    total = slots["free"] + slots["resident"]
    return [] if total == stats["capacity_pages"]["host"] else [f"slots {slots}"]


def _ms(tally: Tally) -> dict[str, float]:
    return {name: 1000 * seconds for name, seconds in tally.slowest.items()}


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(only: str = "") -> list[dict[str, Any]]:
    """Play the faults whose name contains `only`; a row each, or the reason why one cannot be played here."""
    rows: list[dict[str, Any]] = []
    for fault in FAULTS:
        if only not in fault.name:
            continue
        if reason := fault.needs():
            rows.append({"fault": fault.name, "skipped": reason})
            continue
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory) / "kv"
            place.mkdir()
            rows.append(asdict(play(fault, place, TABLE_REQUESTS)))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Print the table; exit code 1 if an answer was wrong, a fault was not felt, or a tier did not come back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name contains TEXT")
    arguments = parser.parse_args()
    rows = run(arguments.only)
    print(json.dumps(rows, indent=2) if arguments.json else markdown(rows))
    return int(any("skipped" not in row and not is_good(row) for row in rows))


def is_good(row: dict[str, Any]) -> bool:
    """Right answers only, the fault felt, the tier back, nothing left over."""
    is_back = row["healed_s"] is not None or not row["is_lifted"]
    return bool(row["right"] == row["requests"] and row["is_felt"] and is_back and not row["leaks"])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for docs/faults.md."""
    lookup, load = 1000 * LOOKUP_DEADLINE_S, 1000 * LOAD_DEADLINE_S
    head = ["fault", "requests", "right", f"lookup ms (of {lookup:.0f})", f"load ms (of {load:.0f})", "other ms"]
    head += ["breaker opened", "back after s", "counters"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"| {row['fault']} | not played: {row['skipped']} |" + " |" * 7
    slowest = row["slowest_ms"]
    other = max((ms for name, ms in slowest.items() if name not in WAITS), default=0.0)
    healed = "NEVER" if row["is_lifted"] else "not lifted"
    if row["healed_s"] is not None:
        healed = f"{row['healed_s']:.1f}"
    counters = ", ".join(f"{name} {n}" for name, n in row["counters"].items()) or "none"
    problems = [*(["NOT FELT"] if not row["is_felt"] else []), *row["leaks"], *row["errors"][:1]]
    cells = [row["fault"], row["requests"], row["right"]]
    cells += [f"{slowest.get('wait_lookup', 0):.0f}", f"{slowest.get('wait', 0):.0f}", f"{other:.0f}"]
    cells += [row["breaker_opened"] or "no", healed, "; ".join([counters, *problems])]
    return "| " + " | ".join(str(cell).replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
