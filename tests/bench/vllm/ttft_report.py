"""What the TTFT bench has measured so far: rows, medians, ratios within a turn, and the goals.

A ratio compares two rows that were measured in the same turn (the k-th load with the k-th hit of vLLM's own cache, a
save with the cold run beside it, the k-th loads of two engines), and is the median over turns, so that what else the
machine does falls out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

KINDS = ("wall_s", "cpu_s", "all_cpu_s")


class Goal(NamedTuple):
    """A ratio and what it should not exceed. `over` is (engine, row); `better` is what is compared."""

    text: str
    row: tuple[str, str]
    over: tuple[str, str]
    limit: float
    kinds: tuple[str, ...]


GOALS = (
    Goal("host: TTFT over vLLM's own warm cache", ("host", "load"), ("host", "own_cache"), 1.15, ("wall_s", "cpu_s")),
    Goal("disk: TTFT over the native fs tier", ("disk", "load"), ("fs", "load"), 1.0, ("wall_s", "cpu_s")),
    Goal("tier: TTFT over the native fs tier", ("tier", "load"), ("fs", "load"), 1.0, ("wall_s", "cpu_s")),
    Goal("no reuse, saved to host", ("host", "save"), ("host", "cold"), 1.02, ("wall_s", "all_cpu_s")),
    Goal("no reuse, saved to host and disk", ("disk", "save"), ("disk", "cold"), 1.02, ("wall_s", "all_cpu_s")),
)


class TtftReport:
    """Collects rows; after each one everything so far is in the file `out`, if one is given."""

    def __init__(self, facts: dict[str, Any], out: Path | None) -> None:
        self._facts = facts
        self._out = out
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take one row, print it, write everything."""
        self._rows.append(row)
        hooks = f"   hooks {1e6 * row['hooks_s'] / row['steps']:4.0f} us x {row['steps']} steps" if row["steps"] else ""
        print(
            f"{row['length']:6d} turn {row['rep']}  {row['engine']:5s} {row['row']:9s} {row['wall_s']:8.3f} s wall "
            f"{row['cpu_s']:8.3f} s CPU{hooks}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        """Write medians, goals and every row."""
        if self._out is not None:
            part = self._out.with_suffix(".part")
            part.write_text(json.dumps({**self._facts, **self.summary(), "rows": self._rows}, indent=1))
            part.replace(self._out)

    def summary(self) -> dict[str, Any]:
        """Medians by length, engine and row; hook costs; goals with their ratios."""
        lengths = sorted({row["length"] for row in self._rows})
        return {
            "medians": {str(length): self._medians(length) for length in lengths},
            "hooks_us_per_step": self._hooks(),
            "goals": [result for length in lengths for goal in GOALS for result in self._judge(goal, length)],
        }

    def print_summary(self) -> None:
        """The tables and the goals, for people."""
        summary = self.summary()
        for length, engines in summary["medians"].items():
            print(f"\n{length} tokens{'':12s}{'wall':>10s}{'CPU':>10s}{'all CPU':>10s}   turns")
            for engine, rows in engines.items():
                for name, values in rows.items():
                    print(f"  {engine:6s}{name:12s}" + "".join(f"{values[k]:10.3f}" for k in KINDS), values["num"])
        print("\nscheduler's hooks, us per step:", summary["hooks_us_per_step"])
        for goal in summary["goals"]:
            mark = "ok    " if goal["ok"] else "missed"
            print(
                f"{mark}  {goal['goal']}, {goal['length']} tokens: {goal['ratio']} ({goal['kind']}, <= {goal['limit']})"
            )

    def _medians(self, length: int) -> dict[str, Any]:
        samples: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for row in self._rows:
            if row["length"] == length:
                samples[row["engine"]][row["row"]].append(row)
        return {
            engine: {
                name: {**{kind: round(median(r[kind] for r in rows), 4) for kind in KINDS}, "num": len(rows)}
                for name, rows in by_name.items()
            }
            for engine, by_name in samples.items()
        }

    def _hooks(self) -> dict[str, float]:
        totals: dict[str, list[float]] = {}
        for row in self._rows:
            if row["steps"]:
                total = totals.setdefault(f"{row['engine']}.{row['row']}", [0.0, 0.0])
                total[0] += row["hooks_s"]
                total[1] += row["steps"]
        return {name: round(1e6 * seconds / steps, 1) for name, (seconds, steps) in totals.items()}

    def _judge(self, goal: Goal, length: int) -> list[dict[str, Any]]:
        pairs = self._pairs(length, goal.row, goal.over)
        results = []
        for kind in goal.kinds if pairs else ():
            ratio = median(row[kind] / over[kind] for row, over in pairs)
            results.append(
                {
                    "goal": goal.text,
                    "length": length,
                    "kind": kind,
                    "ratio": round(ratio, 4),
                    "limit": goal.limit,
                    "ok": ratio <= goal.limit,
                    "pairs": len(pairs),
                }
            )
        return results

    def _pairs(
        self, length: int, one: tuple[str, str], other: tuple[str, str]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The k-th rows of both in the same turn."""
        found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {
            one: defaultdict(list),
            other: defaultdict(list),
        }
        for row in self._rows:
            key = (row["engine"], row["row"])
            if row["length"] == length and key in found:
                found[key][row["rep"]].append(row)
        turns = sorted(found[one].keys() & found[other].keys())
        return [pair for turn in turns for pair in zip(found[one][turn], found[other][turn], strict=False)]
