"""kill -9 on a process that saves through a store, and two processes on one directory.

After a kill, a new store on the same directory finds every page that was acknowledged, serves none that is corrupt, and
knows none that was never saved. `python -m tests.fault.test_store_crash ROUNDS` plays more rounds and prints figures.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from kvstore.page import split_key
from kvstore.store import LocalStore
from tests.fault.crash_writer import EXCLUSIVE
from tests.fault.faults import PROMPTS, disk_store
from tests.helpers.stores import PAGE_BYTES, load, prompt

ROOT = Path(__file__).parents[2]
ROOMY_PAGES = 1 << 15  # more than a writer fills before it is killed: what it acknowledged must stay
TIGHT_PAGES = 48  # two batches of a writer, which goes round in it many times: slots are reused all the while
ROUNDS_PER_DIRECTORY = 10
STARTS_WITHIN_S = 60.0


@dataclass(slots=True)
class Figures:
    """What rounds of killing showed, in pages; `ready_s` are the times until the store was open again."""

    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    corrupt: int = 0
    phantoms: int = 0
    unacknowledged_found: int = 0
    ready_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Journal:
    """Prompts (seed -> blocks) that the writers tried to save, and those they acknowledged, in order."""

    path: Path
    tried: dict[int, int] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)

    def read(self) -> None:
        text = self.path.read_text() if self.path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last line may have been cut by the kill
            verb, seed, blocks = line.split()
            (self.tried if verb == "try" else self.acknowledged)[int(seed)] = int(blocks)


def rounds(
    directory: Path, count: int, seed: int, pages: int, *, exclusive: bool = False
) -> Iterator[tuple[Journal, LocalStore, float]]:
    """Kill a writer `count` times on one directory; after each, yield its journal and a new store on the directory."""
    rng = random.Random(seed)
    journal = Journal(directory / "journal")
    for number in range(count):
        first_seed = 1_000_000 * seed + 10_000 * number
        kill_a_writer(directory, pages, journal.path, first_seed, rng, "save-exclusive" if exclusive else "save")
        journal.read()
        with ExitStack() as stack:
            began = time.monotonic()
            disk = EXCLUSIVE if exclusive else {}
            store = disk_store(stack, directory / "kv", capacity_bytes=pages * PAGE_BYTES, **disk)
            yield journal, store, time.monotonic() - began
            store.check()


def kill_a_writer(directory: Path, pages: int, journal: Path, first_seed: int, rng: random.Random, mode: str) -> None:
    """Let a writer run for a random while: mostly from its first line on, sometimes before it has opened anything."""
    command = [sys.executable, "-m", "tests.fault.crash_writer", mode, str(directory / "kv"), str(pages)]
    size = journal.stat().st_size if journal.exists() else 0
    with subprocess.Popen([*command, str(journal), str(first_seed)], cwd=ROOT) as writer:
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0.0, 1.5))
        else:
            until = time.monotonic() + STARTS_WITHIN_S
            while (journal.stat().st_size if journal.exists() else 0) == size:
                assert writer.poll() is None, f"the writer ended by itself: {writer.returncode}"
                assert time.monotonic() < until, "the writer wrote nothing"
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.5))
        assert writer.poll() is None, f"the writer ended by itself: {writer.returncode}"
        writer.kill()


def check(journal: Journal, store: LocalStore, figures: Figures, *, must_be_there: dict[int, int]) -> None:
    """Load all that was tried: acknowledged prompts come whole, others as far as they were written, none is wrong."""
    keys = {key for seed, blocks in journal.tried.items() for key in store.request(prompt(blocks, seed)).keys}
    tier = store._dispatcher.lanes["disk"].tier
    figures.phantoms += sum(split_key(page.key)[0] not in keys for page in tier.scan())
    figures.phantoms += store.wait_lookup(store.request(prompt(8, seed=77))).num_blocks
    for seed, blocks in journal.tried.items():
        loaded, _ = load(store, store.request(prompt(blocks, seed)), timeout_s=30.0)  # compares every byte
        if seed in must_be_there:
            figures.lost += blocks - loaded
        elif seed not in journal.acknowledged:
            figures.unacknowledged_found += loaded
    figures.corrupt += store.stats()["corrupt_pages"]["disk"]


def play(directory: Path, count: int, seed: int, *, exclusive: bool = False) -> Figures:
    """Rounds on a directory where everything fits."""
    figures = Figures()
    known: set[int] = set()
    for journal, store, ready_s in rounds(directory, count, seed, ROOMY_PAGES, exclusive=exclusive):
        check(journal, store, figures, must_be_there=journal.acknowledged)
        figures.acknowledged += sum(blocks for at, blocks in journal.acknowledged.items() if at not in known)
        known = set(journal.acknowledged)
        figures.rounds += 1
        figures.ready_s.append(ready_s)
    return figures


def play_tight(directory: Path, count: int, seed: int) -> Figures:
    """Rounds on a small directory: the batch that was acknowledged last is there, what is older may have been evicted.

    Two batches fit, so the one that was being written when the writer was killed has not pushed it out.
    """
    figures = Figures()
    known = 0
    for journal, store, ready_s in rounds(directory, count, seed, TIGHT_PAGES):
        newest = dict(list(journal.acknowledged.items())[known:][-1:])
        known = len(journal.acknowledged)
        check(journal, store, figures, must_be_there=newest)
        figures.acknowledged += sum(newest.values())
        figures.rounds += 1
        figures.ready_s.append(ready_s)
    return figures


def assert_nothing_lost(figures: Figures) -> None:
    assert (figures.lost, figures.corrupt, figures.phantoms) == (0, 0, 0), figures


def test_after_kills_every_acknowledged_page_is_there_and_no_other(tmp_path: Path) -> None:
    figures = play(tmp_path, count=3, seed=1)

    assert_nothing_lost(figures)
    assert figures.acknowledged > 0


def test_after_kills_an_exclusive_disk_has_every_page_that_a_flush_acknowledged_and_no_other(tmp_path: Path) -> None:
    figures = play(tmp_path, count=3, seed=3, exclusive=True)

    assert_nothing_lost(figures)
    assert figures.acknowledged > 0


def test_after_kills_in_the_middle_of_evictions_no_page_is_wrong(tmp_path: Path) -> None:
    assert_nothing_lost(play_tight(tmp_path, count=2, seed=2))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_after_sixty_kills_every_acknowledged_page_is_there(tmp_path: Path) -> None:
    for figures in play_many(tmp_path, 60):
        assert_nothing_lost(figures)


def play_many(directory: Path, count: int) -> Iterator[Figures]:
    """Rounds on directories of both kinds, two roomy ones for each tight one."""
    for number in range(-(-count // ROUNDS_PER_DIRECTORY)):
        place = directory / str(number)
        place.mkdir()
        player = play_tight if number % 3 == 2 else play
        yield player(place, min(ROUNDS_PER_DIRECTORY, count - number * ROUNDS_PER_DIRECTORY), seed=10 + number)


class TestTwoProcesses:
    @pytest.mark.parametrize("pages", [24, 1024], ids=["they evict each other's pages", "all pages fit"])
    def test_both_always_get_right_bytes(self, tmp_path: Path, pages: int) -> None:
        for seconds in (2.0, 8.0, 32.0):  # a busy machine may evict all that is saved before any of it is written
            tallies = [json.loads(output) for output in run_engines(tmp_path, pages, seconds=seconds)]
            for tally in tallies:
                assert tally["errors"] == []
                assert tally["wrong"] == 0
                assert tally["right"] == tally["requests"] > 0
            if all(tally["hits"] > 0 for tally in tallies):
                return
        raise AssertionError(f"no hits: {tallies}")

    def test_one_finds_what_the_other_has_saved(self, tmp_path: Path) -> None:
        run_engines(tmp_path, 256, seconds=1.0)

        with ExitStack() as stack:
            store = disk_store(stack, tmp_path)
            loaded = [load(store, store.request(prompt(*at)))[0] for at in PROMPTS]

        assert loaded == [blocks for blocks, _ in PROMPTS]


def run_engines(directory: Path, pages: int, seconds: float) -> list[str]:
    """Two engines in processes of their own on one directory; what each printed."""
    command = [sys.executable, "-m", "tests.fault.crash_writer", "engine", str(directory), str(pages), str(seconds)]
    engines = [subprocess.Popen([*command, str(seed)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for seed in (1, 2)]
    try:
        outputs = [engine.communicate(timeout=STARTS_WITHIN_S)[0] for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
            engine.wait()
    assert [engine.returncode for engine in engines] == [0, 0]
    return outputs


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for figures in play_many(Path(directory), int(sys.argv[1])):
            print(json.dumps(asdict(figures)), flush=True)


if __name__ == "__main__":
    main()
