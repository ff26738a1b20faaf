"""When requests are sent: so many at a time, or at times that do not wait for answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvstore.errors import ConfigError
from kvstore.load.requests import Workload


@dataclass(frozen=True, slots=True)
class Closed:
    """The next request is sent when one is answered: `concurrency` are always under way.

    Such users are patient: a server that slows down is asked less.
    """

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"concurrency = {self.concurrency} is too small; it must be at least 1")

    def __str__(self) -> str:
        return f"closed loop, {self.concurrency} at a time"


@dataclass(frozen=True, slots=True)
class Open:
    """Request i is due `times_s[i]` seconds after the beginning, however slow the answers are."""

    times_s: tuple[float, ...]
    kind: str

    def __str__(self) -> str:
        return f"open loop, {self.kind}"


Arrivals = Closed | Open


def poisson(num_requests: int, rate_per_s: float, seed: int) -> Open:
    """Arrivals of a Poisson process; the first one at once."""
    if not rate_per_s > 0:
        raise ConfigError(f"rate = {rate_per_s} is no rate; it is requests per second, above 0")
    drawn = random.Random(f"{seed}/arrivals")
    times = [0.0]
    for _ in range(num_requests - 1):
        times.append(times[-1] + drawn.expovariate(rate_per_s))
    return Open(tuple(times), f"{rate_per_s:g} requests/s (Poisson)")


def trace_times(workload: Workload, speedup: float) -> Open:
    """The trace's own times, `speedup` times as fast; the first one at once."""
    if not speedup > 0:
        raise ConfigError(f"speedup = {speedup} is no factor; 10 plays ten minutes in one")
    if not workload.has_times:
        raise ConfigError(f"workload {workload.name} has no times of its own; use --rate or --concurrency")
    times = [request.at_s or 0.0 for request in workload.requests]
    if times != sorted(times):
        raise ConfigError("the trace's times run backwards; use --rate or --concurrency")
    return Open(tuple((at - times[0]) / speedup for at in times), f"times of the trace, {speedup:g} times as fast")
