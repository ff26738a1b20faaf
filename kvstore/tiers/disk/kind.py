"""The disk tier by name: its settings, and how it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationInfo, field_validator

from kvstore.config.section import Section
from kvstore.config.values import CODEC, Admit, Bytes, Codec, Count, OrNone, PathOrNone, Policy, Seconds, check_admit
from kvstore.tiers.kind import TierContext, TierKind, TierTraits
from kvstore.units import GiB

if TYPE_CHECKING:
    from kvstore.tiers.base import Tier


class DiskConfig(Section):
    """A directory on local NVMe: an LMDB index and a slab file of pages."""

    path: PathOrNone = Field(
        default=None, description="Directory of the disk tier, made if absent; none turns the tier off."
    )
    capacity_bytes: Bytes = Field(default=4 * GiB, description="Size of the slab file, preallocated at the start.")
    policy: Policy = Field(default="lru", description="Eviction policy: which page leaves first.")
    ttl_s: Seconds = Field(default=0.0, ge=0, description="A page unused for this long is dropped; 0 means never.")
    workers: Count = Field(default=4, ge=1, le=64, description="Threads that read and write pages.")
    direct_io: bool = Field(default=True, description="Bypass the page cache (O_DIRECT) where the file system can.")
    shared: bool = Field(default=True, description="Other processes may store there too; false keeps them out.")
    admit: Admit = Field(
        default="always",
        description="Which pages are written: all; only from their second use on; or, where one leaves for another, "
        "those that the policy's forecast finds worth more.",
    )
    exclusive: bool = Field(
        default=False,
        description="Write pages when they are about to leave host memory; for room, those that it has leave first: "
        "more room, but a crash loses what only host memory had. A flush writes all. Needs shared = false.",
    )
    max_writes_per_day: Annotated[Bytes | None, OrNone] = Field(
        default=None,
        description="Bytes that may be written in a day, an hour's share of it at once; what is beyond waits while "
        "it is in host memory. None sets no bound.",
    )
    codec: Codec = CODEC
    timeout_s: Seconds = Field(default=2.0, gt=0, le=600, description="Longest time for one batch of reads or writes.")

    @field_validator("admit")
    @classmethod
    def _by_a_forecast_that_there_is(cls, admit: str, info: ValidationInfo) -> str:
        return check_admit(admit, info.data.get("policy", "lru"))

    @field_validator("exclusive")
    @classmethod
    def _of_one_store(cls, exclusive: bool, info: ValidationInfo) -> bool:
        if exclusive and info.data.get("shared", True):
            raise ValueError("it needs disk.shared = false: what is used leaves the disk, and others may want it")
        return exclusive


def _open(section: DiskConfig, context: TierContext) -> Tier:
    from kvstore.codecs.coder import PageCoder
    from kvstore.tiers.disk.tier import DiskTier  # with it LMDB

    assert section.path is not None
    coder = PageCoder(section.codec, context.layout)
    return DiskTier.open(
        section.path,
        context.layout.fingerprint,
        coder.slot_bytes,
        section.capacity_bytes,
        direct=section.direct_io,
        shared=section.shared,
        coder=coder,
    )


KIND = TierKind(
    name="disk",
    section=DiskConfig,
    open=_open,
    switch="path",
    traits=lambda section: TierTraits(is_indexed=True, is_shared=section.shared),
    directory="path",
    capacity="capacity_bytes",
    color="#d98c00",
)
