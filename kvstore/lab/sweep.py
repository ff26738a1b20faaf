"""A trace played through setups, beside the floor and the ceiling.

    player = Player(trace, costs)
    cells = [player.cell(setup) for setup in setups_of(Setup(...), rooms, policies)]

The floor is LRU, the policy to beat; the ceiling is the offline optimum (optimum.py). Computed tokens stand beside the
hit rate: where nearly all is hit, a fall of 0.2 points is 5 % more to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.lab import compiled, replay
from kvstore.lab.cell import ReplayCell, SpeculationGain
from kvstore.lab.optimum import optimal_hit_tokens
from kvstore.lab.sessions import num_sessions
from kvstore.lab.setup import ALWAYS, DISK, HOST, PREDICTED, REDIS, Played, Setup, Speculate
from kvstore.lab.timing import Costs, ReplayTiming, time_of
from kvstore.lab.traces import ReplayTrace

AUTO, PLANNER, COMPILED = ENGINES = ("auto", "planner", "compiled")
LRU = "lru"
LEAST_GAP = 0.005  # between floor and ceiling; a share of less says nothing

OnProgress = Callable[[str, int], object]


@dataclass(frozen=True, slots=True)
class ReplayOutcome:
    """A trace played through a setup. tokens: hit tokens, shape (num_requests, num_tiers)."""

    setup: Setup
    played: Played
    tokens: npt.NDArray[np.int64]
    timing: ReplayTiming
    token_hit_rate: float


class Player:
    """Plays one trace, by the compiled engine or by the planner's.

    engine:      one of ENGINES; "auto" is the compiled one where it is built and knows the setup, else the planner's.
    on_progress: is told what is played, and how many references are done in all plays; what it raises ends the play.
    num_references, num_distinct, num_sessions: of the trace; its references, different blocks, and sessions.
    """

    def __init__(
        self,
        trace: ReplayTrace,
        costs: Costs | None = None,
        engine: str = AUTO,
    ) -> None:
        """Raise ConfigError for an engine that is none, or is not built."""
        if engine not in ENGINES:
            raise ConfigError(f"--engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
        if engine == COMPILED and not compiled.is_built:
            raise ConfigError("--engine compiled is not built on this machine; leave the option out, or say planner")
        self.trace = trace
        self.costs = costs or Costs()
        self.num_references = sum(len(request.blocks) for request in trace.requests)
        self.num_distinct = trace.num_distinct
        self.num_sessions = num_sessions(trace)
        self.at_s = np.array([request.at_s for request in trace.requests], np.float64)
        self.prompt_tokens = np.array([request.num_prompt_tokens for request in trace.requests], np.int64)
        self._engine = engine
        self.on_progress: OnProgress = lambda what, num_done: None
        self._num_plays = 0
        self._arrays = compiled.TraceArrays.of(trace) if compiled.is_built else None
        self._total_tokens = int(self.prompt_tokens.sum())
        self._optima: dict[int, int] = {}
        self._floor: ReplayOutcome | None = None
        self._twin: ReplayOutcome | None = None  # of the setup that speculated last, without speculation

    def engine_of(self, setup: Setup) -> str:
        """Return the name of the engine that plays this setup."""
        is_compiled = self._engine == COMPILED or (self._engine == AUTO and compiled.can_play(setup))
        return COMPILED if is_compiled else PLANNER

    def play(self, setup: Setup) -> Played:
        """Play the trace through a setup. Raises ConfigError for what the engine cannot play."""
        tell = self._teller(f"{setup.policy} at {' + '.join(f'{size:,}' for _, size in setup.tiers)} blocks")
        if self._arrays is not None and self.engine_of(setup) == COMPILED:
            played = compiled.play(self._arrays, setup, tell)
        else:
            played = replay.play(self.trace, setup, tell)
        self._num_plays += 1
        return played

    def hit_tokens(self, played: Played) -> npt.NDArray[np.int64]:
        """Return the hit tokens of each request by tier, nearest tier first."""
        return played.hit_tokens(self.prompt_tokens, self.trace.block_tokens)

    def optimal_tokens(self, num_blocks: int) -> int:
        """Return the most prompt tokens that one store of so many blocks could have served."""
        num_blocks = min(num_blocks, self.num_distinct) or 1  # all of more is the same
        if num_blocks not in self._optima:
            tell = self._teller(f"the optimum at {num_blocks:,} blocks")
            tell(0)
            if self._arrays is None:
                self._optima[num_blocks] = optimal_hit_tokens(self.trace, num_blocks)
            else:
                played = compiled.optimum(self._arrays, num_blocks, tell)
                self._optima[num_blocks] = int(self.hit_tokens(played).sum())
            self._num_plays += 1
        return self._optima[num_blocks]

    def outcome(self, setup: Setup) -> ReplayOutcome:
        """Play the trace through a setup; return its hits and seconds."""
        played = self.play(setup)
        tokens = self.hit_tokens(played)
        timing = time_of(self.costs.model(setup), self.at_s, self.prompt_tokens, tokens, setup.replicas)
        return ReplayOutcome(setup, played, tokens, timing, int(tokens.sum()) / (self._total_tokens or 1))

    def nothing(self, replicas: int = 1) -> ReplayTiming:
        """Return the seconds of the trace where nothing is ever stored."""
        setup = Setup(((HOST, 1),))
        hits = np.zeros((len(self.at_s), 1), np.int64)
        return time_of(self.costs.model(setup), self.at_s, self.prompt_tokens, hits, replicas)

    def cell(self, setup: Setup) -> ReplayCell:
        """Play a setup, and what it is to be compared with; return all figures."""
        ceiling = self.optimal_tokens(setup.room) / (self._total_tokens or 1)
        floor = self._floor_of(setup)
        outcome = floor if setup == floor.setup else self.outcome(setup)
        gap = ceiling - floor.token_hit_rate
        by_tier = (outcome.tokens.sum(axis=0) / (self._total_tokens or 1)).tolist()
        timing = outcome.timing
        return ReplayCell(
            trace=self.trace.name,
            setup=setup,
            share=setup.tiers[0][1] / (self.num_distinct or 1),
            token_hit_rate=outcome.token_hit_rate,
            hit_rate_by_tier=dict(zip(setup.names, by_tier, strict=True)),
            computed_tokens=self._total_tokens - int(outcome.tokens.sum()),
            lru=floor.token_hit_rate,
            min=ceiling,
            lru_gap_closed=(outcome.token_hit_rate - floor.token_hit_rate) / gap if gap >= LEAST_GAP else None,
            requests=len(self.trace.requests),
            seconds=outcome.played.cpu_s,
            engine=self.engine_of(setup),
            written=dict(zip(setup.names, outcome.played.written, strict=True)),
            prefill_time_saved=timing.saved,
            ttft_s=timing.percentiles(),
            busy=timing.busy,
            gpu_s=timing.spent_s,
            speculation=self._gain_of(outcome),
        )

    def _gain_of(self, outcome: ReplayOutcome) -> SpeculationGain | None:
        told = outcome.played.speculated
        if told is None:
            return None
        setup = replace(outcome.setup, speculate=None)
        if self._twin is None or self._twin.setup != setup:
            self._twin = self._floor if self._floor is not None and self._floor.setup == setup else self.outcome(setup)
        host, *lower = self._twin.tokens.sum(axis=0).tolist()
        slow = sum(lower)
        return SpeculationGain(
            turned=(int(outcome.tokens[:, 0].sum()) - host) / slow if slow else None,
            wasted_per_used=told.wasted / told.used if told.used else None,
            brought=told.brought,
            used=told.used,
            wasted=told.wasted,
            stops=told.stops,
        )

    def _floor_of(self, setup: Setup) -> ReplayOutcome:
        floor = floor_of(setup)
        if self._floor is None or self._floor.setup != floor:
            self._floor = self.outcome(floor)
        return self._floor

    def _teller(self, what: str) -> Callable[[int], object]:
        before = self._num_plays * self.num_references
        return lambda num_done: self.on_progress(what, before + num_done)


def setups_of(
    base: Setup,
    rooms: Sequence[Sequence[tuple[str, int]]],
    policies: Sequence[str],
    codecs: Sequence[str] = ("exact",),
    hints: Sequence[float] = (0.0,),
    speculate: Sequence[Speculate | None] = (None,),
) -> list[Setup]:
    """Return a setup for each choice of rooms, codec, policy, share of hints, and speculation where there is a lower
    tier; what shares a floor stands together.

    rooms: for each tier, nearest first, the sizes to choose from; one of 0 blocks leaves the tier out.
    """
    setups = []
    for chosen in product(*rooms):
        tiers = tuple((name, num_blocks) for name, num_blocks in chosen if num_blocks)
        stores = replace(base, tiers=tiers)
        if len(tiers) == 1:  # those words are about lower tiers
            stores = replace(stores, is_exclusive=False, writes_per_day=None, admit=ALWAYS)
        if DISK not in stores.names:
            stores = replace(stores, writes_per_day=None)
        for codec in codecs if REDIS in stores.names else codecs[:1]:
            setups += [
                replace(stores, policy=policy, codec=codec, hints=share, speculate=how)
                for policy, share, how in product(policies, hints, speculate if len(tiers) > 1 else (None,))
            ]
    return setups


def floor_of(setup: Setup) -> Setup:
    """Return the setup that is the floor of another: LRU without a time to live, forecasts, hints and speculation."""
    admit = ALWAYS if setup.admit == PREDICTED else setup.admit
    return replace(setup, policy=LRU, ttl_s=None, admit=admit, hints=0.0, speculate=None)


def num_plays(setups: Sequence[Setup]) -> int:
    """Return how many plays the cells of some setups take about: each, a floor for each room, and the optima."""
    floors = {floor_of(setup) for setup in setups}
    return len(floors | set(setups)) + len({setup.room for setup in setups})
