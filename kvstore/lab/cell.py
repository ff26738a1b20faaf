"""One configuration of a sweep, played: the figures that tables, pictures, advice and JSON are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvstore.lab.setup import Setup

TOLD = (50, 95, 99)  # percentiles of TTFT that are told


@dataclass(frozen=True, slots=True)
class SpeculationGain:
    """The gain of speculation beside the same stores without it.

    turned: hit tokens of host memory more, of those that lower tiers gave without it; None where these gave none.
    wasted_per_used: bytes; None where nothing was used.
    brought, used, wasted: pages. stops: times it stopped itself.
    """

    turned: float | None
    wasted_per_used: float | None
    brought: int
    used: int
    wasted: int
    stops: int


@dataclass(frozen=True, slots=True)
class ReplayCell:
    """A trace played through a setup, beside the floor and the ceiling.

    share:          of the trace's different blocks, that host memory has room for.
    lru, min:       token hit rates of the floor and the ceiling. The ceiling is that of one store as large as the
                    largest tier of all replicas, or as all of them where they are exclusive.
    lru_gap_closed: of the way from one to the other; None where that is too short to say.
    seconds:        CPU time of the replay.
    written:        blocks written, by tier.
    prefill_time_saved: share of all prompts' prefill seconds, after loading (timing.py).
    ttft_s:         the 0th to the 100th percentile; empty where it is not modelled.
    busy:           share of the replicas' time; above 1 their queues only grow, and TTFT is the queue's.
    gpu_s:          seconds of prefill and loading, all replicas together.
    speculation:    of a setup that speculates.
    """

    trace: str
    setup: Setup
    share: float
    token_hit_rate: float
    hit_rate_by_tier: dict[str, float]
    computed_tokens: int
    lru: float
    min: float
    lru_gap_closed: float | None
    requests: int
    seconds: float
    engine: str
    written: dict[str, int]
    prefill_time_saved: float
    ttft_s: tuple[float, ...]
    busy: float
    gpu_s: float
    speculation: SpeculationGain | None = None

    @property
    def policy(self) -> str:
        """The policy of every tier."""
        return self.setup.policy

    @property
    def capacity(self) -> int:
        """Blocks of host memory."""
        return self.setup.tiers[0][1]

    @property
    def is_overloaded(self) -> bool:
        """True if the replicas get more work than they can do: TTFT is then that of the queue."""
        return self.busy > 1

    def as_record(self) -> dict[str, Any]:
        """Return the record that `--json` writes; its keys do not change, but for `speculation` where it was played."""
        return {
            "trace": self.trace,
            "policy": self.policy,
            "capacity": self.capacity,
            "token_hit_rate": self.token_hit_rate,
            "hit_rate_by_tier": self.hit_rate_by_tier,
            "computed_tokens": self.computed_tokens,
            "prefill_time_saved": self.prefill_time_saved,
            "lru_gap_closed": self.lru_gap_closed,
            "min": self.min,
            "lru": self.lru,
            "requests": self.requests,
            "seconds": self.seconds,
        } | ({} if self.speculation is None else {"speculation": asdict(self.speculation)})

    def as_details(self) -> dict[str, Any]:
        """Return the record and all else that is known of it, for `--details`."""
        setup = self.setup
        return self.as_record() | {
            "share": self.share,
            "tiers": dict(setup.tiers),
            "written": self.written,
            "codec": setup.codec,
            "ttl_s": setup.ttl_s,
            "exclusive": setup.is_exclusive,
            "admit": setup.admit,
            "writes_per_day": setup.writes_per_day,
            "hints": setup.hints,
            "replicas": setup.replicas,
            "routing": setup.routing,
            "pooled": setup.is_pooled,
            "engine": self.engine,
            "ttft_s": {f"p{percent}": self.ttft_s[percent] for percent in TOLD} if self.ttft_s else {},
            "busy": self.busy,
            "gpu_s": self.gpu_s,
        }
