"""GPUs and media by name; what is measured stands for what is assumed."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.lab.hardware import GPUS, MEDIA, Medium, find_gpu, media_of


def never(tier: str, place: str) -> Medium:
    raise AssertionError(f"{tier} {place} is not to be measured")


def test_host_memory_is_as_fast_as_the_gpus_bus() -> None:
    assert media_of("", GPUS["h100"], never)["host"] is MEDIA["pcie5"]
    assert media_of("", GPUS["a100"], never)["host"] is MEDIA["pcie4"]
    assert media_of("disk=2nvme", GPUS["l40s"], never)["disk"] is MEDIA["2nvme"]


def test_measured_media_are_asked_for_by_place() -> None:
    def measure(tier: str, place: str) -> Medium:
        return Medium(f"{tier} at {place}", 1.0, 0.0)

    found = media_of("measured,disk=/mnt/nvme,redis=redis://cache:6379/0", GPUS["h100"], measure)

    assert {tier: medium.name for tier, medium in found.items()} == {
        "host": "host at ",
        "disk": "disk at /mnt/nvme",
        "redis": "redis at redis://cache:6379/0",
    }


@pytest.mark.parametrize("text", ["disk=tape", "tape=nvme", "disk=measured", "redis=/tmp", "host=/tmp", "nvme", "="])
def test_a_medium_that_is_none_shows_the_list(text: str) -> None:
    with pytest.raises(ConfigError, match="TIER=MEDIUM, of host, disk, redis and pcie4"):
        media_of(text, GPUS["h100"], never)


def test_a_gpu_that_is_none_shows_the_list() -> None:
    with pytest.raises(ConfigError, match="one of a100, l40s, h100, h200, b200"):
        find_gpu("abacus")
