"""The demo's results: stages, the table, two sentences and the JSON file.

A stage is one or more turns; a turn is one prompt answered with the store, beside the same prompt computed without it.
Pure: no process, no model; the demo fills these values and tests make them up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

TIERS = ("host", "disk", "redis")

# The stages in the order in which they are played and shown.
TITLES = {
    "cold": "cold",
    "host": "host",
    "disk": "disk, new process",
    "redis": "redis, second replica",
    "conversation": "conversation",
    "fork": "fork that shares half",
}
BAR_TITLES = {
    "cold": "cold",
    "host": "host memory",
    "disk": "disk\n(new process)",
    "redis": "Redis\n(second replica)",
    "conversation": "conversation\n(last turn)",
    "fork": "fork\n(shares half)",
}


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """One prompt answered by a replica.

    reused:  prompt tokens that were loaded rather than computed, by tier.
    ttft_s:  wall seconds from the prompt's tokens to the first new token.
    cpu_s:   CPU seconds of the replica in that time, all threads.
    tokens:  the greedily chosen new tokens, in full.
    """

    prompt_tokens: int
    reused: dict[str, int]
    ttft_s: float
    cpu_s: float
    tokens: tuple[int, ...]
    text: str = ""

    @property
    def reused_tokens(self) -> int:
        """Tokens loaded from any tier."""
        return sum(self.reused.values())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StageAnswer:
        """Read what a replica sent."""
        return cls(
            prompt_tokens=int(record["prompt_tokens"]),
            reused={str(tier): int(count) for tier, count in record["reused"].items()},
            ttft_s=float(record["ttft_s"]),
            cpu_s=float(record["cpu_s"]),
            tokens=tuple(int(token) for token in record["tokens"]),
            text=str(record["text"]),
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt twice: `answer` with the store, `reference` computed without any, `cold_ttft_s` what it took cold."""

    answer: StageAnswer
    reference: StageAnswer
    cold_ttft_s: float

    @property
    def identical(self) -> bool:
        """Whether the store changed nothing: the same prompt, the same new tokens."""
        same_prompt = self.answer.prompt_tokens == self.reference.prompt_tokens
        return same_prompt and len(self.answer.tokens) > 0 and self.answer.tokens == self.reference.tokens

    @property
    def speed_up(self) -> float:
        """TTFT cold over TTFT here."""
        return self.cold_ttft_s / self.answer.ttft_s


@dataclass(frozen=True, slots=True)
class Stage:
    """A named part of the demo; its figures are those of its last turn, whose prompt holds all turns before."""

    name: str
    turns: tuple[Turn, ...]

    @property
    def last(self) -> Turn:
        """The turn that stands for the stage."""
        return self.turns[-1]

    @property
    def identical(self) -> bool:
        """Whether every turn was."""
        return all(turn.identical for turn in self.turns)


@dataclass(frozen=True, slots=True)
class DemoReport:
    """All stages of one run.

    left_out: stages that were not played, with the reason.
    """

    model: str
    dtype: str
    threads: int
    stages: tuple[Stage, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether every stage gave the tokens of a run without the store."""
        return all(stage.identical for stage in self.stages)

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, if it was played."""
        return next((stage for stage in self.stages if stage.name == name), None)


def to_json(report: DemoReport) -> dict[str, Any]:
    """The numbers, in the documented structure (docs: README, "The demo")."""
    return {
        "model": report.model,
        "dtype": report.dtype,
        "threads": report.threads,
        "stages": [_stage_record(stage) for stage in report.stages],
        "identical": report.identical,
    }


def write_json(report: DemoReport, path: Path, explained: Mapping[str, Any] | None = None) -> None:
    """Write the numbers to `path`; what `--explain` measured goes under a key of its own."""
    record = to_json(report)
    if explained is not None:
        record["explain"] = dict(explained)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_table(report: DemoReport) -> Table:
    """One row per turn."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("stage", no_wrap=True)
    table.add_column("prompt\ntokens", justify="right", no_wrap=True)
    for tier in TIERS:
        table.add_column(f"from\n{tier}", justify="right", no_wrap=True)
    table.add_column("TTFT", justify="right", no_wrap=True)
    table.add_column("speed-up", justify="right", no_wrap=True)
    table.add_column("same\ntokens", justify="center", no_wrap=True)
    for stage in report.stages:
        for number, turn in enumerate(stage.turns, start=1):
            title = TITLES[stage.name]
            table.add_row(
                title if len(stage.turns) == 1 else f"{title}, turn {number + 1}",
                f"{turn.answer.prompt_tokens:,}",
                *(_count(turn.answer.reused.get(tier, 0)) for tier in TIERS),
                f"{turn.answer.ttft_s:.2f} s",
                "-" if stage.name == "cold" else f"{turn.speed_up:.1f}x",
                "[green]yes[/]" if turn.identical else "[bold red]NO[/]",
            )
    return table


def sentences(report: DemoReport) -> tuple[str, str]:
    """Two sentences on what was seen: how fast, and whether anything changed."""
    return _speed_sentence(report), _identity_sentence(report)


def _stage_record(stage: Stage) -> dict[str, Any]:
    answer = stage.last.answer
    return {
        "name": stage.name,
        "prompt_tokens": answer.prompt_tokens,
        "reused": {tier: answer.reused.get(tier, 0) for tier in TIERS},
        "ttft_s": round(answer.ttft_s, 4),
        "cpu_s": round(answer.cpu_s, 4),
        "identical": stage.identical,
    }


def _speed_sentence(report: DemoReport) -> str:
    cold = report.stage("cold")
    if cold is None:
        return "The cold stage was not played, so there is nothing to compare with."
    places = {
        "host": "from host memory",
        "disk": "from disk in a new process",
        "redis": "from Redis in a replica that had never seen the prompt",
    }
    warm = []
    for name, place in places.items():
        stage = report.stage(name)
        if stage is not None:
            turn = stage.last
            found = "" if turn.answer.reused_tokens else ", though nothing was reused there"
            warm.append(f"{turn.answer.ttft_s:.2f} s {place} ({turn.speed_up:.1f}x{found})")
    start = (
        f"Computing all {cold.last.answer.prompt_tokens:,} prompt tokens, the first answer began after "
        f"{cold.last.answer.ttft_s:.2f} s"
    )
    return f"{start}; with their KV pages at hand it began after {_join(warm)}." if warm else f"{start}."


def _identity_sentence(report: DemoReport) -> str:
    turns = sum(len(stage.turns) for stage in report.stages)
    wrong = [stage.name for stage in report.stages if not stage.identical]
    if wrong:
        return f"NOT the same: {_join(wrong)} gave other tokens than the model gives without the store; this is a bug."
    partly = [
        f"{stage.last.answer.reused_tokens / stage.last.answer.prompt_tokens:.0%} of the {label}"
        for name, label in (("conversation", "last turn of the conversation"), ("fork", "forked prompt"))
        if (stage := report.stage(name)) is not None
    ]
    reused = f", and {_join(partly)} did not have to be computed" if partly else ""
    return f"All {turns} answers had exactly the tokens that the model gives without the store{reused}."


def _count(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "-"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
