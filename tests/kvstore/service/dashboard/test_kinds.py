"""The page's names and colours of tiers are the registry's, also of a tier that is somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.service.dashboard import kinds
from kvstore.tiers import registry
from tests.helpers.distributions import distribution

KIND = """
from kvstore.tiers.disk.kind import DiskConfig
from kvstore.tiers.kind import TierKind
KIND = TierKind("attic", DiskConfig, None.__class__, switch="path")
"""


def test_every_tier_that_is_installed_has_a_name_and_a_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = distribution(tmp_path, "kvtiers-attic", {registry.GROUP: {"attic": "attic_tier:KIND"}}, {"attic_tier": KIND})
    monkeypatch.syspath_prepend(site)

    assert kinds.script() == b'export const LOWER = ["disk", "redis", "attic"];\n'
    assert kinds.colors()["attic"] == kinds.FREE[0]
    assert f"--attic: {kinds.FREE[0]};" in kinds.sheet().decode()
    assert ".place.attic { border-left-color: var(--attic); }" in kinds.sheet().decode()


def test_without_others_there_are_ours() -> None:
    assert kinds.colors() == {name: kind.color for name, kind in registry.kinds().items()}
