"""A player of one trace: it plays setups by the compiled engine or by the planner's, whichever is wanted or can."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.lab import compiled, replay
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.setup import Played, Setup
from kvstore.lab.traces import ReplayTrace

AUTO, PLANNER, COMPILED = ENGINES = ("auto", "planner", "compiled")

OnProgress = Callable[[int], object]


class Player:
    """Plays one trace.

    engine: one of ENGINES; "auto" is the compiled one where it is built and knows the setup, else the planner's.
    """

    def __init__(self, trace: ReplayTrace, engine: str = AUTO) -> None:
        """Raise ConfigError for an engine that is none, or is not built."""
        if engine not in ENGINES:
            raise ConfigError(f"--engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
        if engine == COMPILED and not compiled.is_built:
            raise ConfigError("--engine compiled is not built on this machine; leave the option out, or say planner")
        self.trace = trace
        self.prompt_tokens = np.array([request.num_prompt_tokens for request in trace.requests], np.int64)
        self._engine = engine
        self._arrays = compiled.TraceArrays.of(trace) if compiled.is_built else None

    def engine_of(self, setup: Setup) -> str:
        """Return the name of the engine that plays this setup."""
        is_compiled = self._engine == COMPILED or (self._engine == AUTO and compiled.can_play(setup))
        return COMPILED if is_compiled else PLANNER

    def play(self, setup: Setup, on_progress: OnProgress | None = None) -> Played:
        """Play the trace through a setup. Raises ConfigError for what the engine cannot play."""
        if self._arrays is not None and self.engine_of(setup) == COMPILED:
            return compiled.play(self._arrays, setup, on_progress)
        return replay.play(self.trace, setup, on_progress)

    def hit_tokens(self, played: Played) -> npt.NDArray[np.int64]:
        """Return the hit tokens of each request by tier, shape (num_requests, num_tiers), nearest tier first.

        The last block of a prompt counts with the tokens that are in it.
        """
        reached = np.cumsum(played.hit_blocks.astype(np.int64), axis=1) * self.trace.block_tokens
        return np.diff(np.minimum(reached, self.prompt_tokens[:, None]), axis=1, prepend=0)

    def optimal_tokens(self, num_blocks: int) -> int:
        """Return the most prompt tokens that one store of so many blocks could have served."""
        if self._arrays is None:
            return optimal_hit_tokens(self.trace, num_blocks)
        return int(self.hit_tokens(compiled.optimum(self._arrays, num_blocks)).sum())
