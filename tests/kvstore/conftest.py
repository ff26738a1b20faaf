from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.store import LocalStore
from tests.helpers.stores import open_small


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours is set, and no file lies in the working directory."""
    for name in list(os.environ):
        if name.upper().startswith("KVSTORE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store() -> Iterator[LocalStore]:
    """A small store without lower tiers, whose books are right at the end."""
    with open_small() as store:
        yield store
        store.check()
