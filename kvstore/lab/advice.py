"""The least that reaches a share of what endless memory would give, and what more or less of it would change.

The ceiling is host memory that holds all blocks: its hit rate, and the prefill time that it saves. A setup reaches a
share of it if it has that share of both: Redis behind a slow network may hit as much and save little. Of the setups
that reach it with the least host memory each, that is best for which a million prompt tokens cost least (price.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.errors import ConfigError
from kvstore.lab.cell import ReplayCell
from kvstore.lab.price import Bill, Pricing
from kvstore.lab.setup import HOST, Setup
from kvstore.lab.sweep import LRU, Player, ReplayOutcome

NEAR = 1.02  # a size is found to so much


@dataclass(frozen=True, slots=True)
class Choice:
    """A setup, its figures and its price. reached: the lesser of its shares of the ceiling's hits and time saved."""

    cell: ReplayCell
    bill: Bill
    reached: float


@dataclass(frozen=True, slots=True)
class SizingAdvice:
    """Advice for one trace.

    share:      of the ceiling that was asked for. rate, saved: the ceiling's.
    choices:    the least host memory of each kind of setup that reaches it, cheapest first.
    less, more: the cheapest with a step less and a step more of host memory; None where there is none.
    out_of_reach: for each kind of setup that does not reach it, all the memory that it may have.
    """

    share: float
    rate: float
    saved: float
    choices: tuple[Choice, ...]
    less: Choice | None
    more: Choice | None
    out_of_reach: tuple[Choice, ...]


def parse_share(text: str) -> float:
    """Read "95%" or "0.95". Raises ConfigError."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if "%" in text else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--advise is {text!r}; write a share of what endless memory would hit, such as 95%")
    return share


def advise(
    player: Player, share: float, setups: Sequence[Setup], sizes: Sequence[int] | None, pricing: Pricing
) -> SizingAdvice:
    """Look for the least host memory of each setup.

    setups: their host memory is what is looked for. sizes: of it to choose from, in rising order; None for any.
    """
    everything = replace(
        setups[0], tiers=((HOST, max(1, player.num_distinct)),), policy=LRU, ttl_s=None, replicas=1, hints=0.0
    )
    ceiling = player.outcome(everything)
    rate, saved = ceiling.token_hit_rate, ceiling.timing.saved
    if not rate:
        raise ConfigError(f"{player.trace.name}: no prompt repeats an earlier one's beginning, so no store is any use")

    def reached(hit_rate: float, time_saved: float) -> float:
        return min(hit_rate / rate, time_saved / saved if saved > 0 else 1.0)

    def enough(outcome: ReplayOutcome) -> bool:
        return reached(outcome.token_hit_rate, outcome.timing.saved) >= share

    def choice(setup: Setup) -> Choice:
        cell = player.cell(setup)
        return Choice(cell, pricing.bill(cell), reached(cell.token_hit_rate, cell.prefill_time_saved))

    found: list[Choice] = []
    short: list[Choice] = []
    for setup in setups:
        size = _least(player, setup, sizes, enough)
        most = sizes[-1] if sizes else max(1, player.num_distinct)
        (short if size is None else found).append(choice(_with_host(setup, most if size is None else size)))
    found.sort(key=lambda each: each.bill.million)
    less = more = None
    if found:
        best = found[0].cell
        less, more = (
            None if size is None else choice(_with_host(best.setup, size))
            for size in _beside(best.capacity, sizes, player.num_distinct)
        )
    return SizingAdvice(share, rate, saved, tuple(found), less, more, tuple(short))


def _with_host(setup: Setup, num_blocks: int) -> Setup:
    return replace(setup, tiers=((HOST, num_blocks), *setup.tiers[1:]))


def _least(
    player: Player, setup: Setup, sizes: Sequence[int] | None, enough: Callable[[ReplayOutcome], bool]
) -> int | None:
    """Return the least host memory that is enough; more of it is taken to be never worse."""
    candidates = sizes or [1, max(1, player.num_distinct)]
    if not enough(player.outcome(_with_host(setup, candidates[-1]))):
        return None
    low, high = -1, len(candidates) - 1  # candidates[high] is enough, candidates[low] is not
    if sizes:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(player.outcome(_with_host(setup, sizes[middle]))) else (middle, high)
        return sizes[high]
    least, most = 0, candidates[-1]
    while most - least > 1 and most > NEAR * least:
        # By ratio first, since sizes span orders of magnitude; from nothing upwards by an eighth of what is enough.
        middle = max(least + 1, int((least * most) ** 0.5) if least else most // 8)
        least, most = (least, middle) if enough(player.outcome(_with_host(setup, middle))) else (middle, most)
    return most


def _beside(size: int, sizes: Sequence[int] | None, num_distinct: int) -> tuple[int | None, int | None]:
    """Return the next size down and up."""
    if sizes:
        at = list(sizes).index(size)
        return (sizes[at - 1] if at else None), (sizes[at + 1] if at + 1 < len(sizes) else None)
    return (size // 2 or None), (min(2 * size, num_distinct) if size < num_distinct else None)
