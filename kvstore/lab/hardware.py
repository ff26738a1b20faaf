"""What the laboratory takes for granted of GPUs and media: rates and latencies, by name, from data sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import ConfigError

# Of the dense bf16 peak, in prefill. With it an 8B model takes 40 us a token at the head of a prompt on one H100.
UTILISATION = 0.406


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. flops: dense bf16 peak a second."""

    name: str
    flops: float

    @property
    def prefill_flops(self) -> float:
        """Floating-point operations a second that a prefill gets."""
        return UTILISATION * self.flops


@dataclass(frozen=True, slots=True)
class Medium:
    """A place for bytes, as loads see it. latency_s: of one load."""

    name: str
    bytes_per_s: float
    latency_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12),
        Gpu("l40s", 362e12),
        Gpu("h100", 989e12),
        Gpu("h200", 989e12),
        Gpu("b200", 2250e12),
    )
}
# One NVMe drive reads 6 GB/s, so that a token of an 8B model takes 21.8 us; PCIe 5 x16 carries 50 GB/s, 2.6 us.
MEDIA = {
    medium.name: medium
    for medium in (
        Medium("dram", 25e9, 20e-6),
        Medium("pinned", 50e9, 20e-6),
        Medium("nvme", 6e9, 200e-6),
        Medium("2nvme", 12e9, 200e-6),
        Medium("redis-10g", 1.1e9, 1e-3),
        Medium("redis-25g", 2.8e9, 1e-3),
        Medium("redis-100g", 11e9, 1e-3),
    )
}
MEDIUM_OF = {"host": "pinned", "disk": "nvme", "redis": "redis-25g"}


def find_gpu(name: str) -> Gpu:
    """Return a GPU. Raises ConfigError, with the list."""
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name!r}; it must be one of {', '.join(GPUS)}")
    return GPUS[name]


def media_of(tiers: Sequence[str], text: str) -> tuple[Medium, ...]:
    """Return the media of tiers: the usual ones, or as "host=dram,disk=2nvme" says. Raises ConfigError."""
    chosen = dict(MEDIUM_OF)
    for word in filter(None, (part.strip() for part in text.split(","))):
        tier, _, name = word.partition("=")
        if tier not in MEDIUM_OF or name not in MEDIA:
            raise ConfigError(
                f"--media has {word!r}; write TIER=MEDIUM, of {', '.join(MEDIUM_OF)} and {', '.join(MEDIA)}"
            )
        chosen[tier] = name
    return tuple(MEDIA[chosen[tier]] for tier in tiers)
