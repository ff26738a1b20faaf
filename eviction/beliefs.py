"""The tables of `Outlook` in words and probabilities, for people: what it believes of each class of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eviction import visits
from eviction.policy import BELIEF_SPANS_S, Belief
from eviction.survival import EDGES, Survival, counts_of


def beliefs(tables: dict[str, Any]) -> list[Belief]:
    """Return what such tables say of each class that was seen, the most seen first. Raises ValueError for others."""
    survival, numbers = Survival(), reasons_of(tables)
    survival.restore(*counts_of(tables))
    reasons = {number: reason for reason, number in numbers.items()}
    classes = survival.classes()
    summaries = [survival.summary(features) for features in classes]
    shares = np.array([[0.0, *used_within] for _, used_within in summaries])
    within = shares @ _AT_SPANS
    uses = np.diff(shares @ _AT_AGES, axis=1)  # by age, as far as the longest span
    totals = uses.sum(axis=1)
    found = [
        Belief(
            tuple(_word(feature, reasons) for feature in features),
            seen,
            tuple(within[i].tolist()),
            float(uses[i] @ _MIDDLES / totals[i]) if totals[i] > 0 else None,
        )
        for i, (features, (seen, _)) in enumerate(zip(classes, summaries, strict=True))
        if seen > 0
    ]
    return sorted(found, key=lambda one: -one.seen)


def reasons_of(tables: dict[str, Any]) -> dict[str, int]:
    """Return the number of each finish reason in such tables. Raises ValueError for others."""
    reasons = tables.get("finish_reasons")
    if not isinstance(reasons, dict) or not all(
        isinstance(reason, str) and type(code) is int and 0 <= code <= visits.MOST_REASONS
        for reason, code in reasons.items()
    ):
        raise ValueError("not a policy's tables: finish_reasons must say which number stands for which reason")
    return dict(reasons)


def _interpolation(at_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What shares at EDGES are multiplied by to have them at other ages. Shape (len(EDGES), len(at_s))."""
    return np.array([np.interp(at_s, EDGES, row) for row in np.eye(len(EDGES))])


_AGES_S = np.append(EDGES[: np.searchsorted(EDGES, BELIEF_SPANS_S[-1])], BELIEF_SPANS_S[-1])
_MIDDLES = (_AGES_S[:-1] + _AGES_S[1:]) / 2
_AT_AGES = _interpolation(_AGES_S)
_AT_SPANS = _interpolation(np.array(BELIEF_SPANS_S))


def _word(feature: int, reasons: Mapping[int, str]) -> str:
    """What a feature of a class means; its hundreds say what kind it is (see `Visits`)."""
    kind, rank = feature // 100, feature % 100
    if kind == 5:
        return ("used once", "used twice")[rank] if rank < 2 else f"used {_values(rank, visits.USES)} times"
    if kind == 4:
        return "said to go on" if rank else "said to be the last turn"
    if kind == 2:
        return f"reply of {_values(rank, visits.REPLIES)} tokens"
    if kind == 1:
        return f"after {reasons.get(rank, 'another end')}"
    if rank == visits.NEW:
        return "new prompt"
    if rank == visits.BRANCH:
        return "branch of another"
    return (
        f"turn came after {_values(rank, visits.PACES_S, step=0)} s"
        if rank
        else f"turn came within {visits.PACES_S[0]:g} s"
    )


def _values(rank: int, limits: Sequence[float], step: int = 1) -> str:
    """The values that have this rank. step: from the last of one rank to the first of the next."""
    if rank >= len(limits):
        return f"more than {limits[-1]:g}"
    if not rank:
        return f"up to {limits[0]:g}" if limits[0] > 1 else f"{limits[0]:g}"
    first = limits[rank - 1] + step
    return f"{first:g}" if first == limits[rank] else f"{first:g} to {limits[rank]:g}"
