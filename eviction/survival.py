"""Survival tables: how long blocks of a kind wait for their next use, learned from uses as they come.

A *class* is a path of features, most telling first ("used twice", "its turn came within a minute", ...), so classes
form a tree. Each has, over ages on a logarithmic scale, the weight of what was used again at that age and the weight of
what had waited that long without a use (Kaplan and Meier, 1958: what still waits counts as far as it has come). A class
with few observations leans on its parent, which adds PARENT_WEIGHT observations of its own shape; the root leans on a
power law, under which what was used last is worth most, as in LRU.

The worth of a block that has waited for some time is its index (Gittins, 1979): the largest ratio, over all times that
one may go on holding it, of the chance of a use to the time held.

Weights are counted in whole units, ONE_OBSERVATION of them, so that sums do not depend on the order in which they are
made: the compiled twin (_survival.h) finds the same worth to the last bit, and both must go on doing so.
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
ONE_OBSERVATION = 1 << 20
MAX_CLASSES = 1024  # what comes later counts with its parent
FEW = 8  # classes that there is room for at first
MAX_DEPTH = 8  # features of a class
STEP_CLASSES = 32  # in one update
VERSION = 2  # 1 had classes by turn
MOST_COUNTED = 1e12  # observations in tables that are restored

_edges = [0.0, FIRST_AGE_S]
while len(_edges) <= NUM_AGES:
    _edges.append(_edges[-1] * AGE_STEP)
EDGES: npt.NDArray[np.float64] = np.array(_edges)
_WIDTHS = np.diff(EDGES)

Features = tuple[int, ...]
Counts = tuple[list[list[int]], bytes, bytes]  # classes; rows of what was used and was at risk, by age, as int64


class Survival:
    """The classes, and what was seen of each. Not thread-safe.

    worth: shape (number of classes, NUM_AGES): uses per second held, at best, by class and age; see `update`.
    """

    def __init__(self) -> None:
        self._paths: list[Features] = []
        self._children: dict[tuple[int, int], int] = {}
        self._parents: list[int] = []
        self._events = np.zeros((FEW, NUM_AGES), np.int64)
        self._at_risk = np.zeros((FEW, NUM_AGES), np.int64)
        self._hazards = np.zeros((FEW, NUM_AGES))
        self._alive = np.ones((FEW, NUM_AGES))  # the share that reaches an age
        self.worth = np.zeros((FEW, NUM_AGES))
        self._next = 0  # class to be updated
        self._add(0, 0)
        self.update()

    def class_of(self, features: Sequence[int]) -> int:
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

    def seen_class_of(self, features: Sequence[int]) -> int:
        """Return the number of the class that these features lead to, as far as it was seen."""
        number = 0
        for feature in features[:MAX_DEPTH]:
            child = self._children.get((number, feature))
            if child is None:
                break
            number = child
        return number

    def count(self, number: int, age: int, used: int, waited: int) -> None:
        """Count, of a class at an age, units of what was used, and of what has waited that long without a use."""
        while True:
            self._events[number, age] += used
            self._at_risk[number, age] += waited
            if not number:
                return
            number = self._parents[number]

    def update(self) -> None:
        """Make hazards and worth anew from what was counted, of STEP_CLASSES classes; the next call goes on."""
        first = self._next if self._next < len(self._paths) else 0
        end = min(first + STEP_CLASSES, len(self._paths))
        self._next = first + STEP_CLASSES
        for number in range(first, end):  # a class leans on its parent, which has a lower number
            above = self._parents[number]
            weight = PARENT_WEIGHT * self._alive[above] if number else np.full(NUM_AGES, ROOT_WEIGHT)
            hazard = self._hazards[above] if number else np.full(NUM_AGES, ROOT_HAZARD)
            used, waited = self._events[number] / ONE_OBSERVATION, self._at_risk[number] / ONE_OBSERVATION
            found = (used + weight * hazard) / (waited + weight + 1e-9)
            self._hazards[number] = np.minimum(found, MOST_HAZARD)
            self._alive[number, 1:] = np.cumprod(1.0 - self._hazards[number])[:-1]
        self.worth[first:end] = _gittins(self._hazards[first:end])

    def counts(self) -> Counts:
        """Return what was counted: of each class its features, what was used by age, and what was at risk."""
        num = len(self._paths)
        return [list(path) for path in self._paths], self._events[:num].tobytes(), self._at_risk[:num].tobytes()

    def restore(self, classes: list[list[int]], events: bytes, at_risk: bytes) -> None:
        """Take in what `counts` gave; into tables that are new only."""
        for path, used, waited in zip(classes, _rows(events), _rows(at_risk), strict=True):
            number = self.class_of(path)
            self._events[number], self._at_risk[number] = used, waited
        self._next = 0
        for _ in range(0, len(self._paths), STEP_CLASSES):
            self.update()
        self._next = 0

    def summary(self, features: Features) -> tuple[float, list[float]]:
        """Return the weight of what was seen of a class, and the share of it that is used again within EDGES[1:]."""
        number = self.class_of(features)
        left = self._alive[number] * (1.0 - self._hazards[number])
        return float(self._at_risk[number, 0]) / ONE_OBSERVATION, (1.0 - left).tolist()

    def classes(self) -> Sequence[Features]:
        """Return every class that was seen."""
        return list(self._paths)

    def _add(self, parent: int, feature: int) -> int:
        number = len(self._paths)
        self._paths.append((*self._paths[parent], feature) if number else ())
        self._parents.append(parent)
        if number == len(self._events):
            for name in ("_events", "_at_risk", "_hazards", "_alive", "worth"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        if number:
            self._children[parent, feature] = number
            # Until the next update it is worth what its parent is worth.
            for rows in (self._hazards, self._alive, self.worth):
                rows[number] = rows[parent]
        return number


def tables_of(counts: Counts) -> dict[str, Any]:
    """Return what was counted, for JSON, but for arrays that JSON has lists for."""
    classes, events, at_risk = counts
    used, waited = [np.round(_rows(units) / ONE_OBSERVATION, 3) for units in (events, at_risk)]
    return {"version": VERSION, "classes": classes, "events": used, "at_risk": waited}


def counts_of(tables: dict[str, Any]) -> Counts:
    """Return what `tables_of` was given. Raises ValueError for anything else."""
    try:
        if tables["version"] != VERSION:
            raise ValueError(f"version is {tables['version']!r:.20}, not {VERSION}")
        classes = [[int(feature) for feature in path] for path in tables["classes"]]
        rows = [np.array(tables[name], np.float64) for name in ("events", "at_risk")]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a policy's tables: {error}") from None
    if any(len(path) > MAX_DEPTH or any(abs(feature) > 1 << 30 for feature in path) for path in classes):
        raise ValueError(f"not a policy's tables: a class has more than {MAX_DEPTH} features, or one that is none")
    shape = (len(classes), NUM_AGES)
    if any(counted.shape != shape for counted in rows) or len(classes) > MAX_CLASSES:
        raise ValueError(f"not a policy's tables: counts of shape {rows[0].shape} for {len(classes)} classes")
    if not all(np.all((counted >= 0) & (counted <= MOST_COUNTED)) for counted in rows):
        raise ValueError("not a policy's tables: a count is negative or no number")
    events, at_risk = [np.rint(counted * ONE_OBSERVATION).astype(np.int64).tobytes() for counted in rows]
    return classes, events, at_risk


def _rows(units: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(units, np.int64).reshape(-1, NUM_AGES)


def age_of(seconds: float) -> int:
    """Return the number of the age that so many seconds are."""
    return min(max(int(np.searchsorted(EDGES, seconds, side="right")) - 1, 0), NUM_AGES - 1)


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
    best_uses, best_held = np.zeros_like(hazards), np.ones_like(hazards)
    for ahead in range(NUM_AGES):
        width = NUM_AGES - ahead
        left = alive[:width]
        uses[:width] += left * hazards[ahead:]
        held[:width] += left * lasting[ahead:]
        left *= staying[ahead:]
        better = uses[:width] * best_held[:width] > best_uses[:width] * held[:width]
        np.copyto(best_uses[:width], uses[:width], where=better)
        np.copyto(best_held[:width], held[:width], where=better)
    worth = best_uses / best_held
    worth[0] = np.maximum(
        worth[0], worth[1]
    )  # the first age is longer than the next: it would look worse for that alone
    return np.ascontiguousarray(worth.T)
