"""What the policies of a directory have learned, for `kvstore inspect`: values for JSON, and tables with bars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from eviction.policy import BELIEF_SPANS_S, Belief, learner
from kvstore.beliefs import as_tree
from kvstore.console import add_row, table
from kvstore.errors import ConfigError
from kvstore.learned import Unreadable, files_in, read_tables
from kvstore.policies import find_policy
from kvstore.units import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

BAR_WIDTH = 30
SHADES = "█▓░"  # within each of BELIEF_SPANS_S
MAX_CLASSES = 24  # of a policy, in a table


def learned_in(directory: Path) -> list[dict[str, Any]]:
    """Return what each file of tables says. One that cannot be read, or whose policy is not here, says why."""
    return [_told(path) for path in files_in(directory)]


def policy_table(told: dict[str, Any], now: float) -> Table:
    """Return the table of one of them."""
    if "problem" in told:
        output = table(f"learned: {Path(told['path']).name}")
        add_row(output, told["problem"])
        return output
    title = f"what {told['policy']} of tier {told['tier']} believes (namespace {told['namespace']}"
    title += f", written {format_seconds(max(0, round(now - told['written_at'])))} ago)"
    numbers = ("1 min", "5 min", "1 h", "mean", "seen")
    output = table("blocks", "next use", *numbers, title=title, right=numbers)
    beliefs = [Belief(tuple(one["words"]), one["seen"], tuple(one["within"]), one["mean_s"]) for one in told["classes"]]
    for one in as_tree(beliefs, MAX_CLASSES):
        mean = "-" if one.mean_s is None else format_seconds(round(one.mean_s))
        words = "  " * len(one.words) + (one.words[-1] if one.words else "all blocks")
        add_row(output, words, _bar(one), *(f"{share:.0%}" for share in one.within), mean, f"{one.seen:,.0f}")
    if not beliefs:
        add_row(output, Text("nothing was seen yet", style="dim"), *[""] * 6)
    return output


def _told(path: Path) -> dict[str, Any]:
    try:
        found = read_tables(path, judge_owner=os.geteuid() != 0)  # root may look at what is another user's
        policy = learner(find_policy(found.policy)())
        if policy is None:
            raise Unreadable("other", f"the policy {found.policy} that is here does not learn")
        beliefs = policy.beliefs(found.tables)
    except (Unreadable, OSError, ConfigError, ValueError) as error:
        return {"path": str(path), "problem": f"cannot be read: {error}"}
    return {
        "path": str(path),
        "tier": found.tier,
        "policy": found.policy,
        "namespace": found.namespace,
        "block_size": found.block_size,
        "written_at": found.written_at,
        "spans_s": list(BELIEF_SPANS_S),
        "classes": [one._asdict() for one in beliefs],
    }


def _bar(belief: Belief) -> str:
    """A bar of the chance of a next use, darker the sooner."""
    bar = ""
    for shade, share in zip(SHADES, belief.within, strict=True):
        bar += shade * (round(BAR_WIDTH * share) - len(bar))
    return bar
