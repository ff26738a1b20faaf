"""kill -9 in the middle of everything: what was acknowledged is there, nothing is torn, nothing appears from nowhere.

A child writes pages and journals each key to a pipe *after* the tier has acknowledged it; it is killed at a random
moment, and the directory is opened again. The page cache survives a killed process, so nothing acknowledged may be
missing.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from kvstore.page import KEY_BYTES, PageKey
from kvstore.testing.pages import fetch, key_of, payload, store
from kvstore.tiers.disk.report import verify
from kvstore.tiers.disk.tier import DiskTier
from tests.helpers.disk import SLOT_BYTES, check_slots, index_of, open_disk
from tests.helpers.waiting import WAIT_S

ROOT = Path(__file__).parents[2]
CAPACITY = 400
BATCH = 4

# Evicts by its own ring, like a planner, so that no page leaves that it did not name. Journal: "+" key after a write
# was acknowledged, "-" key before a write may evict it.
WRITER = """
import collections, itertools, os, sys
from pathlib import Path
from tests.helpers.disk import SLOT_BYTES, open_disk
from kvstore.testing.pages import keys_of, store

path, name, capacity, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tier = open_disk(path, capacity)
ring = collections.deque(page.key for page in tier.scan())
for number in itertools.count():
    keys = keys_of(f"{name}-{number}", batch)
    evict = [ring.popleft() for _ in range(max(0, len(ring) + batch - capacity + 4 * batch))]
    os.write(1, b"".join(b"-" + key for key in evict))
    answers = store(tier, keys, SLOT_BYTES, evict=evict)
    assert all(answers), answers
    os.write(1, b"".join(b"+" + key for key in keys))
    ring.extend(keys)
    if number % 3 == 0:
        tier.touch(list(ring)[:5], expires_at=0.0, timeout_s=10)
"""


def journal_of(raw: bytes) -> tuple[set[PageKey], set[PageKey]]:
    """(acknowledged and not evicted, ever acknowledged or named for eviction) from whole journal entries."""
    present: set[PageKey] = set()
    known: set[PageKey] = set()
    entry = KEY_BYTES + 1
    for start in range(0, len(raw) - entry + 1, entry):
        sign, key = raw[start : start + 1], PageKey(raw[start + 1 : start + entry])
        known.add(key)
        (present.add if sign == b"+" else present.discard)(key)
    return present, known


def kill_a_writer(path: Path, name: str, after_s: float) -> bytes:
    """Start a writer, kill it `after_s` seconds after its first acknowledgement, return its journal."""
    command = [sys.executable, "-c", WRITER, str(path), name, str(CAPACITY), str(BATCH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        journal = os.read(writer.stdout.fileno(), 1 << 16)
        timer_end = time.monotonic() + after_s
        while time.monotonic() < timer_end:
            journal += os.read(writer.stdout.fileno(), 1 << 16)  # an unread pipe would stop the writer at its journal
        writer.kill()
        return journal + writer.stdout.read()


def check_directory(tier: DiskTier, present: set[PageKey], possible: set[PageKey]) -> None:
    """Every page of `present` is served whole; every page found is one of `possible`; the slots add up."""
    stored = {page.key for page in tier.scan()}
    assert present <= stored, f"{len(present - stored)} acknowledged pages are gone"
    assert stored <= possible, f"{len(stored - possible)} pages appeared from nowhere"
    for key in stored:
        assert fetch(tier, [key], SLOT_BYTES) == [payload(key, SLOT_BYTES)]
    assert (tier.counters.corrupt_pages, tier.counters.lost_pages) == (0, 0)
    usage = index_of(tier).usage()
    assert (usage["writing"], usage["leaked"]) == (0, 0)
    check_slots(tier)


def play_rounds(path: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    present: set[PageKey] = set()
    possible: set[PageKey] = set()
    for number in range(rounds):
        journal = kill_a_writer(path, f"{seed}-{number}", rng.uniform(0.0, 0.25))
        written, known = journal_of(journal)
        evicted = known - written
        present = (present - evicted) | written
        possible |= known | in_flight(f"{seed}-{number}", written | evicted)
        with closing(open_disk(path, CAPACITY)) as tier:
            check_directory(tier, present, possible)
            present = {page.key for page in tier.scan()}
        assert not (path / "index.damaged").exists()
    assert all(check.ok for check in verify(path))


def in_flight(name: str, journaled: set[PageKey]) -> set[PageKey]:
    """Keys of the batch that the writer was at when it was killed: published or not, both are right."""
    number = 0
    while key_of((f"{name}-{number}", 0)) in journaled:
        number += 1
    return {key_of((f"{name}-{batch}", i)) for batch in (number - 1, number) for i in range(BATCH)}


def test_a_killed_writer_leaves_every_acknowledged_page_and_none_torn(tmp_path: Path) -> None:
    play_rounds(tmp_path, rounds=5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_killed_writers_leave_every_acknowledged_page_and_none_torn(tmp_path: Path) -> None:
    play_rounds(tmp_path, rounds=60, seed=2)


def test_a_writer_killed_beside_a_living_one_disturbs_nothing(tmp_path: Path) -> None:
    with closing(open_disk(tmp_path, CAPACITY)) as tier:
        mine = [key_of(("mine", number)) for number in range(8)]
        store(tier, mine, SLOT_BYTES)

        journal = kill_a_writer(tmp_path, "dying", 0.1)

        present, _ = journal_of(journal)
        assert present
        for key in present:
            assert fetch(tier, [key], SLOT_BYTES) == [payload(key, SLOT_BYTES)]
        more = [key_of(("more", number)) for number in range(8)]
        assert store(tier, more, SLOT_BYTES) == [True] * 8
        assert fetch(tier, more, SLOT_BYTES) == [payload(key, SLOT_BYTES) for key in more]
        assert tier.counters.corrupt_pages == 0


# Four processes, far more keys than slots: pages are evicted under every reader's hands all the time.
FIGHTER = """
import random, sys, time
from pathlib import Path
from tests.helpers.disk import SLOT_BYTES, open_disk
from kvstore.testing.pages import fetch, keys_of, payload, store

path, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rng, keys = random.Random(seed), keys_of("page", 48)
tier = open_disk(path, 12)
hits = reads = 0
end = time.monotonic() + seconds
while time.monotonic() < end:
    batch = rng.sample(keys, 4)
    if rng.random() < 0.5:
        store(tier, batch, SLOT_BYTES)
    else:
        for key, data in zip(batch, fetch(tier, batch, SLOT_BYTES)):
            reads += 1
            if data is not None:
                hits += 1
                assert data == payload(key, SLOT_BYTES), "a wrong page was served"
assert tier.counters.corrupt_pages == 0, tier.counters
print(reads, hits, tier.counters.lost_pages, tier.counters.fallback_evictions)
"""


def test_processes_that_fight_over_few_slots_serve_no_wrong_page(tmp_path: Path) -> None:
    open_disk(tmp_path, 12).close()
    fighters = [
        subprocess.Popen(
            [sys.executable, "-c", FIGHTER, str(tmp_path), str(seed), "1.5"], stdout=subprocess.PIPE, cwd=ROOT
        )
        for seed in range(4)
    ]
    outputs = [fighter.communicate(timeout=WAIT_S)[0] for fighter in fighters]

    assert [fighter.returncode for fighter in fighters] == [0] * 4
    numbers = [list(map(int, output.split())) for output in outputs]
    assert all(reads > hits > 0 and evictions > 0 for reads, hits, _, evictions in numbers)
    with closing(open_disk(tmp_path, 12)) as tier:
        check_slots(tier)
        assert all(check.ok for check in verify(tmp_path))
