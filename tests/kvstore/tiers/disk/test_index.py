"""What was read of the index is looked at again only if somebody has changed it since."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.testing.pages import TIMEOUT_S, keys_of, store
from kvstore.tiers.disk.index import DiskIndex
from kvstore.tiers.disk.tier import DiskTier
from tests.helpers.disk import SLOT_BYTES, index_of, open_disk

ROOT = Path(__file__).parents[4]
KEYS = keys_of("page", 3)

DELETE = """
import sys
from contextlib import closing
from pathlib import Path
from kvstore.page import PageKey
from tests.helpers.disk import open_disk

with closing(open_disk(Path(sys.argv[1]), 8)) as tier:
    tier.delete([PageKey(bytes.fromhex(sys.argv[2]))], timeout_s=30.0)
"""


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    with closing(open_disk(tmp_path, 8)) as tier:
        store(tier, KEYS, SLOT_BYTES)
        yield tier


def test_nothing_is_read_again_while_nobody_commits(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(tier)
    found = index.find(KEYS)
    records = [record for record in found.records if record is not None]
    monkeypatch.setattr(DiskIndex, "_read", lambda self: pytest.fail("a transaction was begun"))

    assert index.still_there(records, found.snapshot) == [True] * 3


def test_a_page_that_this_process_has_deleted_is_not_there_any_more(tier: DiskTier) -> None:
    index = index_of(tier)
    found = index.find(KEYS)
    records = [record for record in found.records if record is not None]

    tier.delete(KEYS[:1], timeout_s=TIMEOUT_S)

    assert index.still_there(records, found.snapshot) == [False, True, True]


def test_a_page_that_another_process_has_deleted_is_not_there_any_more(tier: DiskTier, tmp_path: Path) -> None:
    index = index_of(tier)
    found = index.find(KEYS)
    records = [record for record in found.records if record is not None]

    subprocess.run([sys.executable, "-c", DELETE, str(tmp_path), KEYS[1].hex()], cwd=ROOT, check=True, timeout=60)

    assert index.still_there(records, found.snapshot) == [True, False, True]
