"""What the laboratory takes for granted of GPUs, media and codecs: rates and latencies, by name.

GPUs      dense bf16 peak of NVIDIA's data sheets, SXM where there is one: A100 312 TFLOPS, L40S 362.05, B200 2,250,
          H100 and H200 half of the 1,979 that are told with sparsity. A100 and L40S sit on PCIe 4, the others on 5.
UTILISATION  an assumption: with it an 8B model takes 40 us a token at the head of a prompt on one H100.
media     assumptions: PCIe at four fifths of its x16 rate (32 and 64 GB/s), one NVMe drive of PCIe 4 at 6 GB/s, Redis
          at nine tenths of its network. measure.py measures this machine instead.
codecs    `lossless` as measured on pages of SmolLM2 (kvstore/codecs): 1.45 times smaller, 505 MiB/s decoded by each
          core. That four connections decode at once is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.errors import ConfigError

UTILISATION = 0.406


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. flops: dense bf16 peak a second. bus: the medium between host memory and it."""

    name: str
    flops: float
    bus: str = "pcie5"

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


@dataclass(frozen=True, slots=True)
class CodecFacts:
    """A codec of pages in Redis. ratio: how many times smaller a page becomes. quality: of what is decoded."""

    name: str
    ratio: float
    decoded_bytes_per_s: float
    quality: str

    def over(self, medium: Medium) -> Medium:
        """Return a medium as loads see it that carries pages encoded so; bytes are those of decoded pages."""
        if self.ratio == 1:
            return medium
        rate = min(medium.bytes_per_s * self.ratio, self.decoded_bytes_per_s)
        return Medium(f"{medium.name}, {self.name}", rate, medium.latency_s)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, "pcie4"),
        Gpu("l40s", 362.05e12, "pcie4"),
        Gpu("h100", 989.5e12),
        Gpu("h200", 989.5e12),
        Gpu("b200", 2250e12),
    )
}
MEDIA = {
    medium.name: medium
    for medium in (
        Medium("pcie4", 25e9, 20e-6),
        Medium("pcie5", 50e9, 20e-6),
        Medium("nvme", 6e9, 200e-6),
        Medium("2nvme", 12e9, 200e-6),
        Medium("redis-10g", 1.1e9, 1e-3),
        Medium("redis-25g", 2.8e9, 1e-3),
        Medium("redis-100g", 11e9, 1e-3),
    )
}
CODECS = {
    codec.name: codec
    for codec in (
        CodecFacts("exact", 1.0, math.inf, "exact"),
        CodecFacts("lossless", 1.45, 4 * 505 * 1024 * 1024, "exact"),
    )
}
USUAL_MEDIA = {"disk": "nvme", "redis": "redis-25g"}  # of host memory: the GPU's bus
MEASURED = "measured"

Measure = Callable[[str, str], Medium]  # of a tier at a place: "" for host memory, a directory, or a URL


def find_gpu(name: str) -> Gpu:
    """Return a GPU. Raises ConfigError, with the list."""
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name!r}; it must be one of {', '.join(GPUS)}")
    return GPUS[name]


def media_of(text: str, gpu: Gpu, measure: Measure) -> dict[str, Medium]:
    """Return the media of all tiers: the usual ones, or as "host=pcie4,disk=2nvme" says.

    "measured" measures this machine: host memory by itself, "disk=DIR" and "redis=URL" where they are.

    Raises ConfigError, with the list, for what is none.
    """
    chosen = {"host": MEDIA[gpu.bus], **{tier: MEDIA[name] for tier, name in USUAL_MEDIA.items()}}
    for word in filter(None, (part.strip() for part in text.split(","))):
        tier, _, name = ("host", "=", MEASURED) if word == MEASURED else word.partition("=")
        is_place = (tier == "disk" and "/" in name) or (tier == "redis" and "://" in name)
        if tier not in chosen or not (name in MEDIA or is_place or (tier, name) == ("host", MEASURED)):
            raise ConfigError(
                f"--media has {word!r}; write TIER=MEDIUM, of {', '.join(chosen)} and {', '.join(MEDIA)}, or "
                "measured, disk=DIRECTORY, redis=URL to measure this machine's"
            )
        chosen[tier] = MEDIA[name] if name in MEDIA else measure(tier, "" if name == MEASURED else name)
    return chosen
