"""From records to numbers: percentiles, hit rates, rates; per replica, per part of the workload, per source.

All shares of tokens are weighted by tokens: the hit rate is the prompt tokens that were not computed over all prompt
tokens, of the requests that were answered. Percentiles are over requests, interpolated between neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvstore.load.player import PlayedWorkload
from kvstore.load.record import FAILED, REFUSED, SKIPPED, STAGES, TIERS, Record


@dataclass(frozen=True, slots=True)
class Spread:
    """How values are spread."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None for none."""
    there = np.array([value for value in values if value is not None])
    if not len(there):
        return None
    p50, p95, p99 = np.percentile(there, (50, 95, 99))
    return Spread(len(there), float(there.mean()), float(p50), float(p95), float(p99), float(there.max()))


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Some answered requests together.

    hit_rate:    hit tokens over prompt tokens, of the requests whose server told both; None if none did.
    hit_tokens:  by tier, nearest first; "cached" where the server told no tiers.
    """

    requests: int
    prompt_tokens: int
    hit_tokens: dict[str, int]
    hit_rate: float | None
    ttft_s: Spread | None


@dataclass(frozen=True, slots=True)
class Failure:
    """One kind of error: how often, and one of them."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers. Spreads are of answered requests; seconds.

    refusals:  429 answers by code, also of requests that were answered in the end.
    ttft_sent_s: time to first token without what a request waited here; ttft_s has it.
    held_s:    how long requests waited, past their time, for what they continue to be answered; part of their TTFT.
    late_s:    how long after its time a request left this machine otherwise: what the load generator itself adds.
               All three None in a closed loop, where requests are due when they are sent.
    """

    name: str
    requests: int
    answered: int
    failed: int
    refused: int
    skipped: int
    interrupted: bool
    wall_s: float
    all: RequestGroup
    by_replica: dict[str, RequestGroup]
    by_part: dict[str, RequestGroup]
    by_source: dict[str, RequestGroup]
    completion_tokens: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    ttft_s: Spread | None
    token_s: Spread | None
    end_to_end_s: Spread | None
    stages: dict[str, Spread | None]
    ttft_sent_s: Spread | None
    held_s: Spread | None
    late_s: Spread | None
    errors: dict[str, Failure]
    refusals: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def summarize(run: PlayedWorkload, open_loop: bool) -> Summary:
    """Reckon a run's numbers."""
    answered = [record for record in run.records if record.ok]
    sent = [record for record in run.records if record.sent_s is not None]
    statuses = Counter(record.status for record in run.records)
    completion_tokens = sum(record.completion_tokens or len(record.piece_s) for record in answered)
    everything = group(answered)
    # The wall clock of the whole run, its last answers alone included: what was delivered in the time it took.
    per_s = 1 / run.wall_s if run.wall_s > 0 else 0.0
    return Summary(
        name=run.name,
        requests=len(run.records),
        answered=len(answered),
        failed=statuses[FAILED],
        refused=statuses[REFUSED],
        skipped=statuses[SKIPPED],
        interrupted=run.interrupted,
        wall_s=run.wall_s,
        all=everything,
        by_replica=dict(sorted(_groups(answered, lambda record: record.replica).items())),
        by_part=_groups(answered, lambda record: record.part),
        by_source=_in_order(_groups(answered, lambda record: record.source), ("computed", *TIERS)),
        completion_tokens=completion_tokens,
        output_tokens_per_s=completion_tokens * per_s,
        prompt_tokens_per_s=everything.prompt_tokens * per_s,
        requests_per_s=len(answered) * per_s,
        ttft_s=everything.ttft_s,
        token_s=spread(record.token_s for record in answered),
        end_to_end_s=spread(record.end_to_end_s for record in answered),
        stages={stage: spread(record.stages.get(stage) for record in answered) for stage in STAGES},
        ttft_sent_s=spread(record.ttft_sent_s for record in answered) if open_loop else None,
        held_s=spread(record.held_s for record in sent) if open_loop else None,
        late_s=spread((record.sent_s or 0.0) - record.planned_s - record.held_s for record in sent)
        if open_loop
        else None,
        errors=_errors(run.records),
        refusals=dict(Counter(code for record in run.records for code in record.refusals)),
    )


def group(answered: Sequence[Record]) -> RequestGroup:
    """Some answered requests together."""
    told = [record for record in answered if record.cached_tokens is not None and record.prompt_tokens]
    hits: Counter[str] = Counter()
    for record in told:
        hits.update(record.hit_tokens if record.hit_tokens is not None else {"cached": record.cached_tokens or 0})
    order = [tier for tier in TIERS if tier in hits] + sorted(set(hits) - set(TIERS))
    told_tokens = sum(record.prompt_tokens or 0 for record in told)
    return RequestGroup(
        requests=len(answered),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in answered),
        hit_tokens={tier: hits[tier] for tier in order},
        hit_rate=sum(hits.values()) / told_tokens if told_tokens else None,
        ttft_s=spread(record.ttft_s for record in answered),
    )


def _groups(answered: Sequence[Record], key: Callable[[Record], str]) -> dict[str, RequestGroup]:
    """Groups by key in the order in which they were met, without those that have none."""
    found: dict[str, list[Record]] = {}
    for record in answered:
        if name := key(record):
            found.setdefault(name, []).append(record)
    return {name: group(records) for name, records in found.items()}


def _in_order(groups: dict[str, RequestGroup], order: Sequence[str]) -> dict[str, RequestGroup]:
    return {name: groups[name] for name in (*order, *sorted(set(groups) - set(order))) if name in groups}


def _errors(records: Sequence[Record]) -> dict[str, Failure]:
    found: dict[str, Failure] = {}
    for record in records:
        if record.status == FAILED:
            count = found[record.error].count if record.error in found else 0
            where = f" ({record.replica})" if record.replica else ""
            example = f"request {record.number}{where}: {record.error_detail}"
            found[record.error] = Failure(count + 1, found[record.error].example if count else example)
    return dict(sorted(found.items(), key=lambda item: -item[1].count))
