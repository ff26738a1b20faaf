"""What a setup costs: room by the month, GPUs by the hour, and both together for a million prompt tokens.

    $ per million = (GPU hours of prefill and loading x gpu + GiB x price x the trace's share of a month) / tokens

The tiers cost all the time, GPUs only while they prefill or load: other work, decoding above all, is taken to fill the
rest of their time. So a store that halves the GPU's seconds halves that part of the price.

The usual prices are assumptions, round figures in dollars: an H100 was offered for 2 to 4 an hour in 2025; memory and
Redis are taken at what cloud machines with much memory and managed Redis cost, disk at local NVMe. Give one's own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from kvstore.errors import ConfigError
from kvstore.lab.cell import ReplayCell
from kvstore.lab.hardware import CODECS
from kvstore.lab.setup import REDIS, Setup
from kvstore.units import GiB

HOURS_A_MONTH = 730.0
USUAL = "usual"


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars: of a GPU by the hour, of the tiers' rooms for each GiB and month."""

    gpu: float = 3.0
    host: float = 4.0
    disk: float = 0.1
    redis: float = 12.0

    def __str__(self) -> str:
        return f"gpu={self.gpu:g} an hour; host={self.host:g}, disk={self.disk:g}, redis={self.redis:g} a GiB and month"


@dataclass(frozen=True, slots=True)
class Bill:
    """The price of a setup. tier_bytes: of room, all replicas. month: of all rooms. million: of prompt tokens."""

    tier_bytes: dict[str, float]
    month: float
    million: float


@dataclass(frozen=True, slots=True)
class Pricing:
    """The prices, and what they are asked of.

    block_bytes: of one block, as it is in host memory. num_gpus: of one replica. span_s, prompt_tokens: of the trace.
    """

    prices: Prices
    block_bytes: float
    num_gpus: int
    span_s: float
    prompt_tokens: int

    def bill(self, cell: ReplayCell) -> Bill:
        """Return what a cell's setup costs for its trace."""
        sizes = self.tier_bytes(cell.setup)
        month = sum(num_bytes / GiB * getattr(self.prices, name) for name, num_bytes in sizes.items())
        return Bill(sizes, month, self._million(cell.gpu_s, month))

    def without(self, gpu_s: float) -> float:
        """Return what a million prompt tokens cost where nothing is stored. gpu_s: of all prefills."""
        return self._million(gpu_s, 0.0)

    def tier_bytes(self, setup: Setup) -> dict[str, float]:
        """Return the bytes of each tier, all replicas together; those of Redis are encoded."""
        smaller = {REDIS: CODECS[setup.codec].ratio}
        return {
            name: setup.replicas * num_blocks * self.block_bytes / smaller.get(name, 1.0)
            for name, num_blocks in setup.tiers
        }

    def _million(self, gpu_s: float, month: float) -> float:
        gpus = gpu_s * self.num_gpus / 3600 * self.prices.gpu
        rooms = month * self.span_s / 3600 / HOURS_A_MONTH
        return (gpus + rooms) / self.prompt_tokens * 1e6 if self.prompt_tokens else 0.0


def parse_prices(text: str) -> Prices:
    """Read "gpu=2.5,disk=0.05"; what is left out, and "usual", are the usual ones. Raises ConfigError."""
    prices, names = Prices(), [field.name for field in fields(Prices)]
    for word in (part.strip() for part in text.split(",")):
        if word in ("", USUAL):
            continue
        name, _, amount = word.partition("=")
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        if name not in names or not 0 <= value < 1e9:
            raise ConfigError(
                f"--price has {word!r}; write NAME=DOLLARS, of {', '.join(names)} (gpu by the hour, the others by GiB "
                f"and month), or {USUAL} for {prices}"
            )
        prices = replace(prices, **{name: value})
    return prices
