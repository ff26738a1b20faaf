"""What a vLLM server counts, read from its `/metrics`: text in, numbers out. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LOCAL = "local_cache_hit"  # vLLM's words for where prompt tokens came from
COMPUTED = "local_compute"
_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([-+.\w]+)(?: \d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """Totals since the server's start.

    by_source: prompt tokens by where they came from, in vLLM's words; by_tier: those that our connector loaded.
    prefill_s, decode_s: summed over requests, so that those that run at once count each.
    """

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    by_source: Mapping[str, int] = field(default_factory=dict)
    by_tier: Mapping[str, int] = field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    load_s: float = 0.0
    compute_wait_s: float = 0.0
    unsaved_pages: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.by_source.get(COMPUTED, self.prompt_tokens)


def read_counters(text: str) -> EngineCounters:
    """The counters in Prometheus' text. What is not there is 0. Raises ValueError for a number that is none."""
    sums: dict[str, float] = {}
    by_source: dict[str, int] = {}
    by_tier: dict[str, int] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        name, value = found[1], float(found[3])
        sums[name] = sums.get(name, 0.0) + value
        labels = dict(_LABEL.findall(found[2] or ""))
        if name == "vllm:prompt_tokens_by_source_total":
            by_source[labels.get("source", "")] = by_source.get(labels.get("source", ""), 0) + int(value)
        elif name == "vllm:kvstore_hit_tokens_total":
            by_tier[labels.get("tier", "")] = by_tier.get(labels.get("tier", ""), 0) + int(value)

    def total(name: str) -> float:
        return sums.get(f"vllm:{name}", 0.0)

    return EngineCounters(
        running=int(total("num_requests_running")),
        waiting=int(total("num_requests_waiting")),
        prompt_tokens=int(total("prompt_tokens_total")),
        new_tokens=int(total("generation_tokens_total")),
        by_source=by_source,
        by_tier=by_tier,
        prefill_s=total("request_prefill_time_seconds_sum"),
        decode_s=total("request_decode_time_seconds_sum"),
        load_s=total("kvstore_load_copy_seconds_total"),
        compute_wait_s=total("kvstore_compute_wait_seconds_total"),
        unsaved_pages=int(total("kvstore_unsaved_pages_total")),
    )
