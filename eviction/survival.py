"""Survival tables: how long blocks of a kind wait for their next use, learned from uses as they come.

A *class* is a path of features, most telling first ("used twice", "its turn came within a minute", ...), so classes
form a tree. Each has, over ages on a logarithmic scale, the weight of what was used again at that age and the weight of
what had waited that long without a use (Kaplan and Meier, 1958: what still waits counts as far as it has come). A class
with few observations leans on its parent, which adds PARENT_WEIGHT observations of its own shape; the root leans on a
power law, under which what was used last is worth most, as in LRU.

The worth of a block that has waited for some time is its index (Gittins, 1979): the largest ratio, over all times that
one may go on holding it, of the chance of a use to the time held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_AGES = 56
FIRST_AGE_S = 0.25
AGE_STEP = 1.3  # 0.25 s to five days
PARENT_WEIGHT = 500.0  # observations; with 2,000 a fifth less of the gap between LRU and the optimum is closed
ROOT_WEIGHT = 50.0
ROOT_HAZARD = 0.03  # of a use in each age: what nothing is known about
MOST_HAZARD = 0.98
MAX_CLASSES = 1024  # what comes later counts with its parent
FEW = 8  # classes that there is room for at first
MAX_DEPTH = 8  # features of a class
STEP_CLASSES = 32  # in one update: 1 ms
VERSION = 1

EDGES: npt.NDArray[np.float64] = np.concatenate(([0.0], FIRST_AGE_S * AGE_STEP ** np.arange(NUM_AGES)))
_WIDTHS = np.diff(EDGES)

Features = tuple[int, ...]


class Survival:
    """The classes, and what was seen of each. Not thread-safe.

    index: shape (number of classes, NUM_AGES): uses per second held, at best, by class and age; see `update`.
    """

    def __init__(self) -> None:
        self._paths: list[Features] = []
        self._children: dict[tuple[int, int], int] = {}
        self._lineage = np.zeros((FEW, MAX_DEPTH + 1), np.intp)  # of a class: itself and all above, root last
        self._depth = np.zeros(FEW, np.intp)
        self._events = np.zeros((FEW, NUM_AGES))
        self._at_risk = np.zeros((FEW, NUM_AGES))
        self._hazards = np.zeros((FEW, NUM_AGES))
        self._alive = np.ones((FEW, NUM_AGES + 1))
        self.index = np.zeros((FEW, NUM_AGES))
        self._next = 0  # class to be updated
        self._add(-1, 0)
        self.update()

    def class_of(self, features: Features) -> int:
        """Return the number of the class that these features lead to, known or new."""
        number = 0
        for feature in features[:MAX_DEPTH]:
            child = self._children.get((number, feature))
            if child is None:
                if len(self._paths) >= MAX_CLASSES:
                    break
                child = self._add(number, feature)
            number = child
        return number

    def waited(self, classes: npt.NDArray[np.intp], ages: npt.NDArray[np.intp], weights: npt.NDArray[Any]) -> None:
        """Count what has reached these ages without a use; arrays of one shape. A class may be in there twice."""
        depths = self._depth[classes]
        for up in range(int(depths.max(initial=-1)) + 1):
            there = depths >= up
            np.add.at(self._at_risk, (self._lineage[classes[there], up], ages[there]), weights[there])

    def reached(self, number: int, first: int, last: int, weight: float) -> None:
        """Count the same of one class, for the ages from `first` to before `last`."""
        self._at_risk[self._lineage[number, : self._depth[number] + 1], first:last] += weight

    def used(self, number: int, age: int, weight: float) -> None:
        """Count a use at this age."""
        self._events[self._lineage[number, : self._depth[number] + 1], age] += weight

    def update(self) -> None:
        """Make hazards and indexes anew from what was counted, of STEP_CLASSES classes; the next call goes on."""
        first = self._next if self._next < len(self._paths) else 0
        numbers = np.arange(first, min(first + STEP_CLASSES, len(self._paths)))
        self._next = first + STEP_CLASSES
        depths = self._depth[numbers]
        for depth in range(int(depths.min()), int(depths.max()) + 1):  # a class leans on its parent
            level = numbers[depths == depth]
            if depth:
                above = self._lineage[level, 1]
                weight, hazard = PARENT_WEIGHT * self._alive[above, :-1], self._hazards[above]
            else:
                weight, hazard = np.full((1, NUM_AGES), ROOT_WEIGHT), np.full((1, NUM_AGES), ROOT_HAZARD)
            found = (self._events[level] + weight * hazard) / (self._at_risk[level] + weight + 1e-9)
            self._hazards[level] = np.clip(found, 0.0, MOST_HAZARD)
            self._alive[level, 1:] = np.cumprod(1.0 - self._hazards[level], axis=1)
        self.index[numbers] = _gittins(self._hazards[numbers])

    def tables(self) -> dict[str, Any]:
        """Return all that was counted: for JSON, but for arrays that JSON has lists for (within a millisecond)."""
        num = len(self._paths)
        return {
            "version": VERSION,
            "classes": [list(path) for path in self._paths],
            "events": np.round(self._events[:num], 3),
            "at_risk": np.round(self._at_risk[:num], 3),
        }

    def restore(self, tables: dict[str, Any]) -> None:
        """Take in what `tables` gave, in place of all that was counted. Raises ValueError for anything else."""
        try:
            if tables["version"] != VERSION:
                raise ValueError(f"version is {tables['version']!r:.20}, not {VERSION}")
            paths = [tuple(map(int, path)) for path in tables["classes"]]
            events = np.array(tables["events"], np.float64)
            at_risk = np.array(tables["at_risk"], np.float64)
            shape = (len(paths), NUM_AGES)
            if events.shape != shape or at_risk.shape != shape or len(paths) > MAX_CLASSES:
                raise ValueError(f"counts of shape {events.shape} for {len(paths)} classes")
            if not (np.isfinite(events).all() and np.isfinite(at_risk).all() and min(events.min(), at_risk.min()) >= 0):
                raise ValueError("a count is negative or no number")
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a policy's tables: {error}") from None
        fresh = Survival()
        for path, used, waited in zip(paths, events, at_risk, strict=True):
            number = fresh.class_of(path)
            fresh._events[number], fresh._at_risk[number] = used, waited
        self.__dict__.update(fresh.__dict__)
        for _ in range(0, len(self._paths), STEP_CLASSES):
            self.update()

    def summary(self, features: Features) -> tuple[float, list[float]]:
        """Return the weight of what was seen of a class, and the share of it that is used again within EDGES[1:]."""
        number = self.class_of(features)
        return float(self._at_risk[number, 0]), (1.0 - self._alive[number, 1:]).tolist()

    def classes(self) -> Sequence[Features]:
        """Return every class that was seen."""
        return list(self._paths)

    def _add(self, parent: int, feature: int) -> int:
        number = len(self._paths)
        self._paths.append((*self._paths[parent], feature) if number else ())
        if number == len(self._depth):
            for name in ("_lineage", "_depth", "_events", "_at_risk", "_hazards", "_alive", "index"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        if number:
            self._children[parent, feature] = number
            self._depth[number] = self._depth[parent] + 1
            self._lineage[number, 1:] = self._lineage[parent, :-1]
            # Until the next update it is worth what its parent is worth.
            self._hazards[number], self._alive[number] = self._hazards[parent], self._alive[parent]
            self.index[number] = self.index[parent]
        self._lineage[number, 0] = number
        return number


def age_of(seconds: float) -> int:
    """Return the number of the age that so many seconds are."""
    return min(max(int(np.searchsorted(EDGES, seconds, side="right")) - 1, 0), NUM_AGES - 1)


def ages_of(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Return the same of an array."""
    return np.clip(np.searchsorted(EDGES, seconds, side="right") - 1, 0, NUM_AGES - 1)


def _gittins(hazards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """For each class and age, the best ratio of uses to time over all ages at which one may stop to wait.

    hazards: shape (classes, NUM_AGES). What has reached an age is on average in the middle of it.
    """
    hazards = np.ascontiguousarray(hazards.T)  # ages first: a slice of them is one piece of memory
    lasting = (1.0 - hazards / 2) * _WIDTHS[:, None]
    staying = 1.0 - hazards
    alive = np.ones_like(hazards)  # of what is at an age, the share that is left after `ahead` more
    uses = np.zeros_like(hazards)
    held = lasting / -2
    best = np.zeros_like(hazards)
    for ahead in range(NUM_AGES):
        width = NUM_AGES - ahead
        left = alive[:width]
        uses[:width] += left * hazards[ahead:]
        held[:width] += left * lasting[ahead:]
        left *= staying[ahead:]
        np.maximum(best[:width], uses[:width] / held[:width], out=best[:width])
    best[0] = np.maximum(best[0], best[1])  # the first age is longer than the next: it would look worse for that alone
    return np.ascontiguousarray(best.T)
