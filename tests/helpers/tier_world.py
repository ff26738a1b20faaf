"""A `TierCore` over rows and two tiers that fail on command, as vLLM's scheduler would drive it; no vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from connectors.vllm_tier.chunks import TierSettings
from connectors.vllm_tier.core import TierCore
from connectors.vllm_tier.jobs import JobDone
from connectors.vllm_tier.lookup import LookupAnswer
from kvstore.testing.pages import FakeClock
from tests.helpers.faulty_tier import FaultyTier
from tests.helpers.rows import Rows, faulty, open_mover
from tests.helpers.waiting import wait_until


def key(name: str, group: int = 0) -> bytes:
    """As vLLM makes them: block hash and group."""
    return name.encode().ljust(32, b"-") + group.to_bytes(4, "big")


KEYS = [key(name) for name in "abcd"]


@dataclass
class TierWorld:
    """A core, its rows and its tiers."""

    rows: Rows = field(default_factory=Rows)
    disk: FaultyTier = field(default_factory=lambda: faulty("disk"))
    redis: FaultyTier = field(default_factory=lambda: faulty("redis"))
    wall: FakeClock = field(default_factory=lambda: FakeClock(4e9))  # later than the tiers' own clock
    jobs: int = 0

    def __post_init__(self) -> None:
        self.core = self.open()

    def open(self, root: bytes = b"model", **changes: object) -> TierCore:
        values: dict[str, object] = {
            "root": root,
            "batch_pages": 2,
            "max_saving_rows": 8,
            "lookup_deadline_s": 5.0,
            "load_deadline_s": 20.0,
            "touch_interval_s": 60.0,
            "ttl_s": {"redis": 100.0},
        }
        settings = TierSettings(**{**values, **changes})  # type: ignore[arg-type]
        mover = open_mover(self.rows, [self.disk, self.redis])
        return TierCore(mover, settings, wall=self.wall)

    def job(self, core: TierCore | None = None) -> JobDone:
        """The next job that ends."""
        (one,) = wait_until((core or self.core).take_done, "no job ended", poll_s=0.001)
        return one

    def save(self, keys: list[bytes], rows: list[int]) -> JobDone:
        self.jobs += 1
        self.core.jobs.save(self.jobs, keys, rows)
        return self.job()

    def load(self, keys: list[bytes], rows: list[int], core: TierCore | None = None) -> JobDone:
        self.jobs += 1
        (core or self.core).jobs.load(self.jobs, keys, rows)
        return self.job(core)

    def look(self, keys: list[bytes], core: TierCore | None = None) -> list[LookupAnswer]:
        """Lookups as in vLLM: again in every step until all are answered."""
        asked = core or self.core

        found: list[LookupAnswer] = []

        def is_answered() -> bool:
            found[:] = [asked.lookup(one) for one in keys]
            asked.end_step()
            return LookupAnswer.ASK_AGAIN not in found

        wait_until(is_answered, "no answer", poll_s=0.001)
        return found


def tier_worlds() -> Iterator[TierWorld]:
    """One world with something in its first rows, for a fixture; closed at the end."""
    world = TierWorld()
    for row in range(4):
        world.rows[row] = row + 1
    yield world
    for tier in (world.disk, world.redis):
        tier.recover()
    world.core.close(20.0)
