"""The messages between the two halves of the vLLM connector, once per engine step.

The scheduler's half decides and sends a `StepPlan` to every worker; each worker copies and answers with a
`StepReport`. Both are plain data, pickled when scheduler and workers are different processes. vLLM merges the reports
of all ranks with `merge` before the scheduler sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvstore.base import Slab

# What either half waits for its threads in a step that computes nothing; no longer, as new requests come between steps.
IDLE_WAIT_S = 0.002


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Pages of one layer group: slot i of the slab and block i of the engine hold the same page."""

    group: int
    slots: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Slots -> blocks, for a request that waits for it.

    is_async: the request is parked until the copy is reported; else it is in this step's forward, and each layer of it
              waits for the copy.
    is_bad:   the plan is not complete (see scheduler.py): nothing is copied, the request computes.
    """

    lease: int
    request: str
    copies: tuple[PageCopies, ...]
    is_async: bool = True
    is_bad: bool = False

    @property
    def blocks(self) -> Iterator[int]:
        """All engine blocks the job was to fill."""
        return (block for part in self.copies for block in part.blocks)


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Blocks -> slots, after this step's forward has filled the blocks."""

    lease: int
    request: str
    copies: tuple[PageCopies, ...]


@dataclass(slots=True)
class StepPlan:
    """The work of a worker in one step.

    num_tokens: that the step's forward computes.
    layout:     the fingerprint both halves must agree on.
    half:       name of the scheduler's half.
    slabs:      where slots lie, from now on: a worker lets go of others. None: where they did.
    heard:      leases of loads that the scheduler has learned to have failed since the last plan.
    """

    num_tokens: int = 0
    layout: str = ""
    half: str = ""
    slabs: tuple[Slab, ...] | None = None
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    heard: tuple[int, ...] = ()


@dataclass(slots=True)
class StepReport:
    """The outcomes of copies since the last report.

    done:          lease -> ranks that have copied it.
    failed:        leases that at least one rank could not copy.
    loaded_bytes, load_seconds, saved_bytes, save_seconds: of the copies between slots and blocks, summed over ranks.
    forward_seconds, forward_tokens: of prefill steps, on engines where the host can tell (CPU); 0 elsewhere.
    error:         the first reason for a failure, for one line in the log.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    saved_bytes: int = 0
    save_seconds: float = 0.0
    forward_seconds: float = 0.0
    forward_tokens: int = 0
    error: str = ""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to tell."""
        return not (self.done or self.failed or self.forward_seconds)

    def merge(self, other: StepReport) -> StepReport:
        """Both reports as one."""
        done = dict(self.done)
        for lease, ranks in other.done.items():
            done[lease] = done.get(lease, 0) + ranks
        return StepReport(
            done,
            self.failed | other.failed,
            self.loaded_bytes + other.loaded_bytes,
            self.load_seconds + other.load_seconds,
            self.saved_bytes + other.saved_bytes,
            self.save_seconds + other.save_seconds,
            max(self.forward_seconds, other.forward_seconds),
            max(self.forward_tokens, other.forward_tokens),
            self.error or other.error,
        )
