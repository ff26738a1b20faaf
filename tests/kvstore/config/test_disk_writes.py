"""Settings of what is written to a disk, and when: what makes no sense is told at the start."""

from __future__ import annotations

import pytest

from kvstore.config.sections import Config
from kvstore.errors import ConfigError


def test_an_exclusive_disk_is_one_stores_own() -> None:
    with pytest.raises(ConfigError, match=r"disk\.exclusive is True .*disk\.shared = false"):
        Config(disk={"exclusive": True})

    assert Config(disk={"exclusive": True, "shared": False}).disk.exclusive


def test_admission_by_forecast_needs_a_policy_that_has_one() -> None:
    with pytest.raises(ConfigError, match=r"disk\.admit is 'predicted' .*policy lru has no forecast"):
        Config(disk={"admit": "predicted"})


def test_a_medium_that_makes_room_by_itself_has_no_admission_by_forecast() -> None:
    with pytest.raises(ConfigError, match=r"redis\.admit"):
        Config(redis={"admit": "predicted"})


def test_a_write_budget_is_a_size() -> None:
    assert Config(disk={"max_writes_per_day": "1TB"}).disk.max_writes_per_day == 10**12
    assert Config(disk={"max_writes_per_day": "none"}).disk.max_writes_per_day is None
    with pytest.raises(ConfigError, match=r"disk\.max_writes_per_day"):
        Config(disk={"max_writes_per_day": "much"})
