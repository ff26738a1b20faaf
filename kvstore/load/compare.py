"""The same requests with the cache and without it: ratios, and whether every answer is the same text.

The run without comes second, not in turns with the first: in turns, the slow prompts of one would make those of the
other wait, and neither would have a throughput of its own. A machine that changes in between changes the ratios; where
that matters, run it again. Conversations go on from the first run's answers in both, so that every prompt is the same
and one different answer is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvstore.load.player import PlayedWorkload
from kvstore.load.record import Record
from kvstore.load.summary import Spread, Summary

CONTEXT_CHARACTERS = 40
NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class ComparisonLine:
    """One measure of both runs. gain: above 1 is better with the cache; None where a side has none.

    unit: "s" or "/s".
    """

    name: str
    unit: str
    cache: float | None
    baseline: float | None

    @property
    def gain(self) -> float | None:
        """How many times as good the run with the cache was."""
        if not self.cache or not self.baseline:
            return None
        return self.baseline / self.cache if self.unit == "s" else self.cache / self.baseline


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that is not the same; both texts from shortly before the place where they part."""

    number: int
    at_character: int
    cache: str
    baseline: str
    replica: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs beside each other.

    compared:     requests that were answered in full in both.
    differences:  of these, all whose texts are not equal.
    warnings:     why the comparison may not mean what it seems to.
    """

    lines: tuple[ComparisonLine, ...]
    compared: int
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, with the gains."""
        return {
            "lines": [{**asdict(line), "gain": line.gain} for line in self.lines],
            "compared": self.compared,
            "same": self.compared - len(self.differences),
            "differences": [asdict(difference) for difference in self.differences],
            "warnings": list(self.warnings),
        }


def compare(
    cache: PlayedWorkload, baseline: PlayedWorkload, with_cache: Summary, without: Summary, *, same_server: bool
) -> Comparison:
    """Put two runs of one workload beside each other."""
    others = {record.number: record for record in baseline.records if record.ok}
    pairs = [(record, others[record.number]) for record in cache.records if record.ok and record.number in others]
    return Comparison(
        lines=tuple(_lines(with_cache, without)),
        compared=len(pairs),
        differences=tuple(_difference(a, b) for a, b in pairs if a.text != b.text),
        warnings=tuple(_warnings(cache, baseline, without, len(pairs), same_server)),
    )


def _lines(cache: Summary, baseline: Summary) -> list[ComparisonLine]:
    lines: list[ComparisonLine] = []
    for name, a, b, points in (
        ("time to first token", cache.ttft_s, baseline.ttft_s, ("p50", "p95", "p99")),
        ("time per output token", cache.token_s, baseline.token_s, ("p50", "p95", "p99")),
        ("end to end", cache.end_to_end_s, baseline.end_to_end_s, ("p50", "p95", "p99")),
        ("prefill", cache.stages["prefill_s"], baseline.stages["prefill_s"], ("mean",)),
        ("queue", cache.stages["queue_s"], baseline.stages["queue_s"], ("mean",)),
    ):
        if a is not None and b is not None:
            lines += [ComparisonLine(f"{name}, {point}", "s", _at(a, point), _at(b, point)) for point in points]
    return [
        *lines,
        ComparisonLine("output tokens", "/s", cache.output_tokens_per_s, baseline.output_tokens_per_s),
        ComparisonLine("prompt tokens", "/s", cache.prompt_tokens_per_s, baseline.prompt_tokens_per_s),
        ComparisonLine("requests", "/s", cache.requests_per_s, baseline.requests_per_s),
    ]


def _at(values: Spread, name: str) -> float:
    return float(getattr(values, name))


def _difference(cache: Record, baseline: Record) -> Difference:
    pairs = zip(cache.text, baseline.text, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cache.text), len(baseline.text)))
    begin, end = max(0, at - CONTEXT_CHARACTERS // 2), at + CONTEXT_CHARACTERS
    return Difference(cache.number, at, cache.text[begin:end], baseline.text[begin:end], cache.replica)


def _warnings(
    cache: PlayedWorkload, baseline: PlayedWorkload, without: Summary, num_compared: int, same_server: bool
) -> Sequence[str]:
    warnings = []
    if same_server and any(without.all.hit_tokens.values()):
        warnings.append(
            'the run without the cache had hits too: this server does not know {"kvstore": {"cache": false}}. '
            "Name one that has no cache with --baseline-url"
        )
    elif same_server and not any(record.cached_tokens is not None for record in baseline.records):
        warnings.append(
            "this server tells nothing of its cache, so the second run may have used it too. "
            "Name one that has no cache with --baseline-url"
        )
    missing = max(len(cache.records), len(baseline.records)) - num_compared
    if missing:
        warnings.append(f"{missing} requests were not answered in both runs and are not compared")
    return warnings
