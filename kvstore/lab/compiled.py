"""The engine of sweeps: a trace played by compiled code, tens of millions of block references a second.

    arrays = TraceArrays.of(trace)
    played = play(arrays, Setup((("host", 10_000),), "lru"))

It hits what the planner hits under the same setup (replay.py), request by request, as far as the planner has the
setup's words; tests hold the two together. A trace is turned into arrays once, and played by any number of setups.

Compiled code is optional: `is_built` is False where the package was installed without a compiler, and `can_play` is
False of policies that it does not know, such as one's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eviction.visits import MOST_REASONS
from kvstore.errors import ConfigError
from kvstore.lab.setup import DISK, PREFILL_TOKENS_PER_S, Played, Setup
from kvstore.lab.traces import ReplayTrace

try:
    from kvstore.lab import _sweep
except ImportError:  # not built on this machine
    is_built = False
else:
    is_built = True

OnProgress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class TraceArrays:
    """A trace as arrays.

    offsets:       int64, shape (num_requests + 1,): the references of request i are offsets[i] to offsets[i + 1].
    ids:           int32, shape (num_references,): blocks, numbered 0 to num_blocks - 1.
    times:         float64, shape (num_requests,).
    prompt_tokens: int64, shape (num_requests,).
    told:          int32, shape (num_requests, 3): a number for each finish reason, whether it was the last turn, and
                   tokens of the reply; -1 where it is not known.
    """

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    times: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    num_blocks: int
    block_tokens: int
    told: npt.NDArray[np.int32]
    _next_uses: list[npt.NDArray[np.int32]] = field(default_factory=list)

    @classmethod
    def of(cls, trace: ReplayTrace) -> TraceArrays:
        """Return the arrays of a trace. Ids are numbered by first use."""
        numbers: dict[int, int] = {}
        lengths = np.array([len(request.blocks) for request in trace.requests], np.int64)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        ids = np.empty(int(offsets[-1]), np.int32)
        for request, start in zip(trace.requests, offsets.tolist(), strict=False):
            for block in request.blocks:
                if block not in numbers:
                    numbers[block] = len(numbers)
            ids[start : start + len(request.blocks)] = [numbers[block] for block in request.blocks]
        return cls(
            offsets,
            ids,
            np.array([request.at_s for request in trace.requests], np.float64),
            np.array([request.num_prompt_tokens for request in trace.requests], np.int64),
            len(numbers),
            trace.block_tokens,
            _told(trace),
        )

    @property
    def num_requests(self) -> int:
        return len(self.times)

    def next_uses(self) -> npt.NDArray[np.int32]:
        """Return for each reference the number of the next request with its block, num_requests for none."""
        if not self._next_uses:
            out = np.empty(len(self.ids), np.int32)
            _sweep.next_uses(self.offsets, self.ids, self.num_blocks, out)
            self._next_uses.append(out)
        return self._next_uses[0]


def policies() -> tuple[str, ...]:
    """Return the names of the policies that `play` knows; none where the engine is not built."""
    return _sweep.POLICIES if is_built else ()


def can_play(setup: Setup) -> bool:
    """True if the engine is built and knows what the setup asks for.

    Policies that learn from requests are played in host memory alone: to lower tiers the planner writes behind, after
    the end of the request that they have learned from, and this engine before it.
    """
    return (
        setup.policy in policies()
        and (setup.policy != "outlook" or len(setup.tiers) == 1)
        and setup.admit in ("always", "second_use")
        and not setup.hints
        and setup.speculate is None
    )


def play(trace: TraceArrays, setup: Setup, on_progress: OnProgress | None = None) -> Played:
    """Play a trace through a setup.

    on_progress: is told now and then how many references are done; what it raises ends the play.

    Raises ConfigError for a setup that cannot be played, see `can_play`.
    """
    if not can_play(setup):
        with_hints = " and hints" if setup.hints else " and speculation" if setup.speculate else ""
        raise ConfigError(
            f"the compiled engine cannot play policy {setup.policy!r} with admission {setup.admit!r}{with_hints}"
        )
    if setup.writes_per_day is not None and [name for name, _ in setup.tiers[1:2]] != [DISK]:
        raise ConfigError("writes_per_day is about a disk tier right below host memory, and there is none")
    num_stores = 1 if setup.is_pooled else setup.replicas
    scale = setup.replicas if setup.is_pooled else 1
    hits = np.empty((trace.num_requests, len(setup.tiers)), np.int32)
    began = time.thread_time()
    written = _sweep.play(
        trace.offsets,
        trace.ids,
        trace.times,
        trace.told,
        trace.num_blocks,
        setup.policy,
        tuple(scale * num_blocks for _, num_blocks in setup.tiers),
        setup.ttl_s or 0.0,
        (
            setup.is_exclusive,
            setup.admit == "second_use",
            num_stores,
            setup.routing == "prefix",
            -1.0 if setup.writes_per_day is None else float(scale * setup.writes_per_day),
            PREFILL_TOKENS_PER_S / trace.block_tokens,
        ),
        hits,
        on_progress,
    )
    return Played(hits, written, time.thread_time() - began)


def optimum(trace: TraceArrays, num_blocks: int, on_progress: OnProgress | None = None) -> Played:
    """Play a trace through a store of `num_blocks` that knows the future (optimum.py)."""
    hits = np.empty(trace.num_requests, np.int32)
    uses = trace.next_uses()
    began = time.thread_time()
    _sweep.optimum(trace.offsets, trace.ids, uses, trace.num_blocks, num_blocks, False, hits, on_progress)
    return Played(hits[:, None], (0,), time.thread_time() - began)


def access(trace: TraceArrays, policy: str, num_blocks: int) -> int:
    """Give a cache of single blocks one reference after the other; return how many of them it had.

    Prefixes mean nothing here: it is what simulators of web caches do, to compare policies with theirs.

    policy: also "min", and "s3fifo-paper", which is told the capacity as the paper has it.
    """
    if policy != "min":
        return _sweep.access(trace.offsets, trace.ids, trace.num_blocks, policy, num_blocks)
    offsets = np.arange(len(trace.ids) + 1, dtype=np.int64)
    uses, hits = np.empty(len(trace.ids), np.int32), np.empty(len(trace.ids), np.int32)
    _sweep.next_uses(offsets, trace.ids, trace.num_blocks, uses)
    _sweep.optimum(offsets, trace.ids, uses, trace.num_blocks, num_blocks, True, hits, None)
    return int(hits.sum())


def _told(trace: ReplayTrace) -> npt.NDArray[np.int32]:
    told = np.full((len(trace.requests), 3), -1, np.int32)
    reasons: dict[str, int] = {}
    for row, request in zip(told, trace.requests, strict=True):
        if request.finish_reason:
            row[0] = min(reasons.setdefault(request.finish_reason, len(reasons)), MOST_REASONS)
        row[2] = request.num_answer_tokens
    return told
