"""The record of one request: its times, its cost, the origin of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TIERS = ("host", "disk", "redis")  # nearest first
ENGINE = "engine"  # what an engine had of a prompt in a cache of its own
STAGES = ("queue_s", "load_s", "prefill_s", "decode_s")

OK, FAILED, REFUSED, SKIPPED = "ok", "failed", "refused", "skipped"


@dataclass(slots=True)
class Record:
    """One request, filled while it is answered. Times are seconds since the run's beginning; None is "not told".

    planned_s:      when it was due; in a closed loop, when it was sent.
    held_s:         how long past that it waited for what it continues to be answered.
    sent_s:         when it was first sent.
    piece_s:        when each piece of text came; a piece is a token, or what the server made of one.
    status:         OK, FAILED (see `error`), REFUSED (429, and not retried), SKIPPED (what it continues has failed).
    hit_tokens:     prompt tokens that were not computed, by tier; None from a server that does not tell.
    cached_tokens:  the same in all, from `usage` where tiers are not told.
    stages:         the server's own seconds: queue_s, load_s, prefill_s, decode_s.
    refusals:       codes of the 429 answers on the way.
    """

    number: int
    conversation: int
    part: str = ""
    planned_s: float = 0.0
    held_s: float = 0.0
    sent_s: float | None = None
    piece_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    status: str = FAILED
    http_status: int | None = None
    error: str = ""
    error_detail: str = ""
    refusals: list[str] = field(default_factory=list)
    replica: str = ""
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    hit_tokens: dict[str, int] | None = None
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.status == OK

    @property
    def ttft_s(self) -> float | None:
        """From when it was due to its first token: an open loop's user waits from then on, sent or not."""
        return self.piece_s[0] - self.planned_s if self.ok and self.piece_s else None

    @property
    def ttft_sent_s(self) -> float | None:
        """From when it was first sent to its first token."""
        return self.piece_s[0] - self.sent_s if self.ok and self.piece_s and self.sent_s is not None else None

    @property
    def end_to_end_s(self) -> float | None:
        """From when it was due to its last token."""
        return self.end_s - self.planned_s if self.ok and self.end_s is not None else None

    @property
    def token_s(self) -> float | None:
        """Mean time of the tokens after the first; None if there is none."""
        num_tokens = self.completion_tokens or len(self.piece_s)
        if not self.ok or num_tokens < 2 or len(self.piece_s) < 2:
            return None
        return (self.piece_s[-1] - self.piece_s[0]) / (num_tokens - 1)

    @property
    def source(self) -> str:
        """The origin of its prompt: the farthest tier that had a part, "computed", or "not told"."""
        if self.cached_tokens is None:
            return "not told"
        if not self.cached_tokens:
            return "computed"
        tiers = [tier for tier, tokens in (self.hit_tokens or {}).items() if tokens]
        known = [tier for tier in reversed(TIERS) if tier in tiers]
        return (known or tiers or ["cached"])[0]

    def take(self, event: Mapping[str, Any]) -> None:
        """Note what an answer's body or one of its events tells beside text: usage, and what only our replicas say."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"))
            self.completion_tokens = _count(usage.get("completion_tokens"))
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _count(details.get("cached_tokens"))
        ours = event.get("kvstore")
        if isinstance(ours, dict):
            self.replica = str(ours.get("replica") or self.replica)
            hits = ours.get("hit_tokens")
            if isinstance(hits, dict):
                self.hit_tokens = {str(tier): _count(tokens) or 0 for tier, tokens in hits.items()}
                from_tiers = sum(self.hit_tokens.values())
                if (of_engine := (self.cached_tokens or 0) - from_tiers) > 0:
                    self.hit_tokens[ENGINE] = of_engine
                self.cached_tokens = max(from_tiers, self.cached_tokens or 0)
            self.stages = {name: float(ours[name]) for name in STAGES if isinstance(ours.get(name), (int, float))}

    def to_json(self) -> dict[str, Any]:
        """All fields, and the two times that are reckoned from them."""
        return {**asdict(self), "ttft_s": self.ttft_s, "token_s": self.token_s}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
