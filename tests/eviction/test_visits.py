"""Visits, compiled and plain: the same histories, the same victims."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from eviction import visits
from eviction.survival import ONE_OBSERVATION

compiled = pytest.importorskip("eviction._visits", reason="eviction._visits is not built")

BLOCKS = 60
GHOSTS = 30
TOLD = (-1, 0, 1)


class Twins:
    """Both, told the same; they must answer the same."""

    def __init__(self) -> None:
        self.pair = (compiled.Visits(GHOSTS), visits.Visits(GHOSTS))

    def ask(self, method: str, *args: Any, in_order: bool = True) -> Any:
        found, expected = [getattr(one, method)(*args) for one in self.pair]
        if not in_order:
            found, expected = sorted(found), sorted(expected)
        assert found == expected, (method, args)
        return found

    def look(self, now: float, num: int) -> None:
        self.ask("victims", num)
        self.ask("worth", list(range(BLOCKS)), now)
        known = [block for block in range(BLOCKS) if block in self.pair[1]._known]
        for num_known in (0, 1, 2, 7) if known else (0,):
            self.ask(
                "prospects", known[num % len(known)] if known else 0, num_known, list(range(BLOCKS)), now, num % 3 - 1
            )
        assert self.pair[0].num_remembered == self.pair[1].num_remembered
        assert self.pair[0].num_cohorts == self.pair[1].num_cohorts


def some(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(BLOCKS) for _ in range(rng.randrange(most))]


def play(rng: random.Random, twins: Twins, num_steps: int) -> None:
    """A random history: prompts that continue each other or not, with blocks named twice; a clock that is set back."""
    now, paths = 0.0, [[0]]
    for _ in range(num_steps):
        now += rng.choice((0.0, 0.3, 1.0, 7.0, 60.0, -2.0))
        step = rng.random()
        if step < 0.5:
            path = some(rng, 12) if rng.random() < 0.4 else rng.choice(paths[-20:]) + some(rng, 4)
            paths.append(path)
            said = rng.choice(TOLD), rng.choice(TOLD), rng.choice((-1, 5, 100, 1000))
            twins.ask("visit", path, now, *said, in_order=False)
        elif step < 0.75:
            twins.ask("arrive", some(rng, 8))
        elif step < 0.8:
            twins.ask("touch", some(rng, 8))
            twins.ask("advance", now)
        elif step < 0.9:
            twins.ask("leave", some(rng, 8), in_order=False)
        else:
            twins.ask("leave", twins.ask("victims", rng.randrange(6)), in_order=False)
        twins.look(now + 3.0, rng.randrange(BLOCKS + 3))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_compiled_names_the_victims_of_its_twin(seed: int) -> None:
    twins = Twins()

    play(random.Random(seed), twins, 1200 if seed % 6 == 0 else 150)

    learned = twins.ask("counts")
    assert len(learned[0]) > 20
    fresh = Twins()
    fresh.ask("restore", *learned)
    assert fresh.ask("counts") == learned
    play(random.Random(seed + 99), fresh, 50)


@pytest.mark.parametrize("blocks", [[-1], [1 << 40], ["a"], [1.0], [None], (1,), None])
def test_what_is_no_list_of_blocks_is_refused_and_changes_nothing(blocks: Any) -> None:
    known = compiled.Visits()
    known.arrive([1, 2])

    for ask in (known.arrive, known.leave, known.touch, lambda bad: known.visit(bad, 0.0, -1, -1, -1)):
        with pytest.raises((ValueError, TypeError)):
            ask(blocks)

    assert known.victims(9) == [2, 1]
    assert known.num_remembered == 2


def test_only_new_visits_are_restored_from_whole_rows() -> None:
    known = compiled.Visits()
    learned = known.counts()
    with pytest.raises(ValueError, match="as many rows"):
        known.restore(learned[0], b"", b"")
    known.visit([1], 0.0, -1, -1, -1)
    with pytest.raises(ValueError, match="new"):
        known.restore(*learned)


def test_a_long_request_weighs_no_more_than_a_short_one() -> None:
    for length in (8, 40, 4000):
        known = compiled.Visits()
        known.visit(list(range(length)), 0.0, -1, -1, -1)
        _, _, at_risk = known.counts()
        assert np.frombuffer(at_risk, np.int64)[0] == pytest.approx(8 * ONE_OBSERVATION, rel=0.01)
