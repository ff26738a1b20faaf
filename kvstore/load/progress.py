"""How a run of a workload goes, in one line with a bar."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console

from kvstore.load.record import FAILED, Record
from kvstore.progress import ProgressBar

RECENT = 200  # TTFTs that the median is taken of


class Progress:
    """Counts records and shows the count. Use as context manager; `add` is what the player calls."""

    def __init__(self, name: str, num_requests: int, console: Console, now: Callable[[], float]) -> None:
        self._name = name
        self._num_requests = num_requests
        self._bar = ProgressBar(console, now)
        self._statuses: Counter[str] = Counter()
        self._ttfts: deque[float] = deque(maxlen=RECENT)
        self._prompt_tokens = self._hit_tokens = self._refusals = 0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        self._bar.update(self.line, 0, self._num_requests)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def add(self, record: Record) -> None:
        """Count a request that has ended."""
        self._statuses[record.status] += 1
        self._refusals += len(record.refusals)
        if record.ttft_s is not None:
            self._ttfts.append(record.ttft_s)
        if record.prompt_tokens and record.cached_tokens is not None:
            self._prompt_tokens += record.prompt_tokens
            self._hit_tokens += record.cached_tokens
        self._bar.update(self.line, self._statuses.total(), self._num_requests)

    @property
    def line(self) -> str:
        """How it goes."""
        parts = [f"{self._name}: {self._statuses.total()}/{self._num_requests} requests"]
        if self._prompt_tokens:
            parts.append(f"hit rate {self._hit_tokens / self._prompt_tokens:.1%}")
        if self._ttfts:
            parts.append(f"TTFT p50 {sorted(self._ttfts)[len(self._ttfts) // 2]:.3f} s")
        if self._refusals:
            parts.append(f"{self._refusals} refusals")
        if self._statuses[FAILED]:
            parts.append(f"{self._statuses[FAILED]} errors")
        return ", ".join(parts)
