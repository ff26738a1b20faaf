"""Random histories of the linker seat against a dumb model: a set of the pages that were stored."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

from connectors.sglang_linker import promises, start
from kvstore.devices.cpu import CpuDevice
from tests.engines.sglang.linker.devices import MoodyDevice
from tests.engines.sglang.linker.engine import PAGE, LinkerEngine, Req, prompt
from tests.engines.sglang.linker.worlds import World, play

STEPS = 60
AMPLE = {"host": {"capacity_bytes": "4MiB"}}
SCARCE = {"host": {"capacity_bytes": "240KiB"}}  # 60 pages; the pool has 64


class History:
    """One engine, and what a dumb model says it may find.

    stored: heads of prompts, by whole pages, that were handed over and not cleared since.
    """

    def __init__(self, world: World, seed: int, extra: dict[str, object], *, can_fail: bool) -> None:
        self.random = random.Random(seed)
        self.can_fail = can_fail
        self.fails = world.rank == world.size - 1  # on one rank alone
        self.engine: LinkerEngine = world.engine(extra)
        self.device = self.engine.core.loads._device
        self.stored: set[tuple[int, ...]] = set()
        self.running: list[Req] = []
        self.asked: list[Req] = []
        self.num_loaded = self.num_failed = 0

    def step(self) -> None:
        verbs = [self.admit, self.admit, self.run, self.run, self.ask, self.abort, self.evict, self.let_go]
        rare = [self.flush, self.clear, self.lapse]
        self.random.choice(verbs if self.random.random() < 0.9 else rare)()
        self.engine.events()

    def prompt(self) -> list[int]:
        """One of few trees of prompts, so that heads are shared."""
        root, branch = self.random.randrange(3), self.random.randrange(4)
        return (prompt(root, 90) + prompt(100 + 10 * root + branch, 120))[: self.random.randrange(20, 210)]

    def check_promise(self, req: Req) -> None:
        end = req.device + req.promised
        assert not req.promised or tuple(req.tokens[:end]) in self.stored, req.log

    def admit(self) -> None:
        if len(self.running) < 3:
            req = self.engine.admit(self.prompt())
            if req is not None:
                self.check_promise(req)
                self.running.append(req)

    def ask(self) -> None:
        self.asked.append(self.engine.match(self.prompt()))
        self.check_promise(self.asked[-1])

    def run(self) -> None:
        """A batch of what was admitted: one forward, as a batch of SGLang has."""
        batch, self.running = self.running, []
        if not batch:
            return
        if self.can_fail and self.random.random() < 0.3:
            fail_in = self.random.randrange(3)
            self.device.fail_in = fail_in if self.fails else -1
        self.num_failed += len(self.engine.forward(*batch))
        self.device.fail_in = -1
        for req in batch:
            self.engine.finish(req)
            if not req.is_failed:
                self.num_loaded += req.loaded
                for end in range(PAGE, len(req.tokens) + 1, PAGE):
                    self.stored.add(tuple(req.tokens[:end]))

    def abort(self) -> None:
        if self.running:
            self.engine.abort(self.running.pop(self.random.randrange(len(self.running))))

    def let_go(self) -> None:
        """A client goes away that was only looked up."""
        if self.asked:
            req = self.asked.pop(self.random.randrange(len(self.asked)))
            self.engine.cache.release_aborted_request(CacheRequestHandle(req.rid, 0))

    def evict(self) -> None:
        self.engine.evict_all()

    def lapse(self) -> None:
        self.engine.core.promises.clear()

    def flush(self) -> None:
        if not self.running:
            self.engine.settle()
            self.engine.flush()
            self.engine.check()

    def clear(self) -> None:
        """An operator clears the store."""
        self.engine.settle()
        self.engine.core.promises.clear()
        if not self.running:
            self.engine.core.store.admin.clear()
            self.stored.clear()
            self.engine.flush()  # what the pool has would be told as stored

    def end(self) -> None:
        self.run()
        self.engine.settle()
        self.engine.check()


def tell(world: World, seed: int, extra: dict[str, object]) -> None:
    """A history from its beginning to its end."""
    history = History(world, seed, extra, can_fail=True)
    for _ in range(STEPS):
        history.step()
    history.end()


@pytest.fixture(autouse=True)
def _moody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.devices.spans.SPAN_BYTES", 1)  # each layer by itself
    monkeypatch.setattr(start, "_devices", lambda tensor: (MoodyDevice(seed=3), CpuDevice()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("extra", [AMPLE, SCARCE], ids=["ample", "scarce"])
def test_whatever_happens_bytes_are_right_and_nothing_is_lost(
    seed: int, extra: dict[str, object], tmp_path: Path
) -> None:
    play(lambda world: tell(world, seed, extra), tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_on_two_ranks_they_stay_alike(seed: int, tmp_path: Path) -> None:
    play(lambda world: tell(world, seed, AMPLE), tmp_path, ranks=2)


def test_what_was_stored_is_found_to_its_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all, a promise is as long as the model's."""
    monkeypatch.setattr(promises, "LOOK_AGAIN_S", 0.0)

    def scenario(world: World) -> None:
        history = History(world, 11, AMPLE, can_fail=False)
        for _ in range(STEPS):
            history.step()
            history.engine.settle()  # on a busy machine offloads may end late, and less is loaded
        history.run()
        history.engine.settle()
        for _ in range(10):
            history.engine.evict_all()
            tokens = prompt(history.random.randrange(3), 90) + prompt(100, 120)
            history.engine.run(tokens[:50])  # the pool has a head of it
            found = history.engine.match(tokens)
            assert found.device == 48
            ends = range(PAGE, len(tokens), PAGE)
            known = max((end for end in ends if tuple(tokens[:end]) in history.stored), default=0)
            assert found.device + found.promised >= known
        history.end()
        assert history.num_loaded > 500

    play(scenario, tmp_path)
