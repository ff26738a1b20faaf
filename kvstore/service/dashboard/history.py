"""The stores' counters, second by second for a quarter of an hour and minute by minute for a day.

A page that is opened now shows the past, so the daemon takes a sample of every store each second. A sample is a row of
counters as they stood: rates are differences between rows, over whatever span is asked for, and the
coarse ring is every sixtieth row of the fine one. Memory is bounded: two rings per store, a quarter of a megabyte.

Pure: the clock and the counters are the caller's. Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.plan.records import HOST
from kvstore.tiers import registry

TIERS = (HOST, *registry.names())  # also those that are not in use: they may be attached
LOWER = TIERS[1:]

FINE_S = 1.0
FINE_ROWS = 900
COARSE_S = 60.0
COARSE_ROWS = 1440

COLUMNS = (
    "lookups",
    "prompt_tokens",
    "ttft_saved_s",
    "saved_bytes",
    "loaded_bytes",
    *(f"hit_tokens.{tier}" for tier in TIERS),
    *(f"fetched_bytes.{tier}" for tier in LOWER),
    *(f"spilled_bytes.{tier}" for tier in LOWER),
)
INDEX = {name: index for index, name in enumerate(COLUMNS)}

Row = npt.NDArray[np.float64]


def row_of(stats: Mapping[str, Any], num_groups: int) -> Row:
    """A sample of `store.stats()`. num_groups: pages per block."""
    slot_bytes = stats["slot_bytes"]
    values = {
        "lookups": stats["lookups"],
        "prompt_tokens": stats["matched_tokens"] + stats["miss_tokens"],
        "ttft_saved_s": stats["ttft_saved_seconds"],
        "saved_bytes": stats["saved_pages"] * slot_bytes,
        "loaded_bytes": sum(stats["hit_blocks"].values()) * num_groups * slot_bytes,
    }
    for tier in TIERS:
        values[f"hit_tokens.{tier}"] = stats["hit_tokens"].get(tier, 0)
    for tier in LOWER:
        lane = stats["lane_bytes"].get(tier, {})
        values[f"fetched_bytes.{tier}"] = lane.get("fetch", 0)
        values[f"spilled_bytes.{tier}"] = lane.get("spill", 0)
    return np.array([values[name] for name in COLUMNS], np.float64)


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of some stores, summed: `at` has their times, `values` a row for each."""

    at: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """The numbers as they stood."""
        found: npt.NDArray[np.float64] = self.values[:, INDEX[name]]
        return found

    def rate(self, name: str) -> npt.NDArray[np.float64]:
        """Growth per second up to each row but the first."""
        rate: npt.NDArray[np.float64] = np.diff(self.column(name)) / np.diff(self.at)
        return rate

    def growth(self, name: str) -> float:
        """Growth from the first row to the last."""
        return float(self.column(name)[-1] - self.column(name)[0]) if len(self.at) > 1 else 0.0


class History:
    """Samples of many stores, taken together. The daemon's event loop only."""

    def __init__(self) -> None:
        self._fine = _Ring(FINE_ROWS)
        self._coarse = _Ring(COARSE_ROWS)
        self._next_coarse = 0.0

    def add(self, at: float, rows: Mapping[Hashable, Row]) -> None:
        """Take a sample of every store. A clock that was set back starts the history anew."""
        if at <= self._fine.last_at:
            self.__init__()  # type: ignore[misc]
        self._fine.add(at, rows)
        if at >= self._next_coarse:
            self._next_coarse = at + COARSE_S - FINE_S / 2
            self._coarse.add(at, rows)

    def span(self, stores: Iterable[Hashable], span_s: float, since: float = 0.0) -> Columns:
        """The samples of the last `span_s` seconds, from one row before `since` on, summed over stores.

        By the second where the fine ring reaches so far, else by the minute.
        """
        ring = self._fine if span_s <= FINE_S * FINE_ROWS else self._coarse
        return ring.read(list(stores), max(ring.last_at - span_s, since))


class _Ring:
    """The last rows of every store, all at the same times."""

    def __init__(self, num_rows: int) -> None:
        self.last_at = 0.0
        self._num_rows = num_rows
        self._at = np.zeros(num_rows)
        self._values: dict[Hashable, npt.NDArray[np.float64]] = {}
        self._count = 0

    def add(self, at: float, rows: Mapping[Hashable, Row]) -> None:
        place = self._count % self._num_rows
        self._at[place] = self.last_at = at
        for key in [key for key in self._values if key not in rows]:
            del self._values[key]
        for key, row in rows.items():
            if key not in self._values:
                # It counted from nothing: rows before it was opened are zeros.
                self._values[key] = np.zeros((self._num_rows, len(COLUMNS)))
            self._values[key][place] = row
        self._count += 1

    def read(self, stores: list[Hashable], since: float) -> Columns:
        num = min(self._count, self._num_rows)
        order = np.arange(self._count - num, self._count) % self._num_rows
        at = self._at[order]
        order = order[max(0, int(np.searchsorted(at, since)) - 1) :]  # the row before tells the first difference
        values = np.zeros((len(order), len(COLUMNS)))
        for key in stores:
            if key in self._values:
                values += self._values[key][order]
        return Columns(self._at[order], values)
