"""The waits, over a store that answers as the test says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvstore import waits
from kvstore.plan.records import (
    CutReason,
    FlushResult,
    LeaseState,
    LeaseStatus,
    LoadLease,
    Match,
    Request,
    RequestOptions,
)
from kvstore.waits import COMPUTING_CALL_S, Deadlines, Waits

REQUEST = Request(1, [], 16, RequestOptions())
TIERS = Match(0, 0, pending=True, cut=CutReason.NEVER_STORED)
COMPUTING = Match(0, 0, pending=True, cut=CutReason.COMPUTING)
FOUND = Match(3, 48)


class Scripted(Waits):
    """Gives one answer after the other; each pending one takes all the time it is given."""

    def __init__(self, answers: Sequence[Match], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waited: list[float] = []
        self._answers = list(answers)
        monkeypatch.setattr(waits.time, "monotonic", lambda: self.now)

    @property
    def _deadlines(self) -> Deadlines:
        return Deadlines(0.5, 2.0)

    def _lookup_within(self, request: Request, wait_s: float) -> Match:
        self.waited.append(wait_s)
        match = self._answers.pop(0)
        self.now += wait_s if match.pending else 0.0
        return match

    def _peek_within(self, request: Request, wait_s: float) -> Match:
        self.waited.append(wait_s)
        return FOUND

    def _poll_within(self, lease: LoadLease, wait_s: float) -> LeaseStatus:
        self.waited.append(wait_s)
        return LeaseStatus(LeaseState.READY, 3, 48)

    def flush(self, timeout_s: float) -> FlushResult:
        return FlushResult(True)


def test_a_time_that_is_no_number_is_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Scripted([TIERS], monkeypatch)

    assert store.wait_lookup(REQUEST, float("nan")) == TIERS
    assert len(store.waited) == 1


def test_a_lookup_waits_for_tiers_until_the_configured_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Scripted([TIERS], monkeypatch)

    assert store.wait_lookup(REQUEST) == TIERS
    assert store.waited == [0.5]


def test_the_callers_timeout_is_for_computing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Scripted([COMPUTING], monkeypatch)

    assert store.wait_lookup(REQUEST, 0.1) == COMPUTING
    assert store.waited == [0.1]


def test_computing_is_waited_for_until_it_ends_and_tiers_have_their_deadline_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Scripted([COMPUTING, COMPUTING, TIERS, FOUND], monkeypatch)

    assert store.wait_lookup(REQUEST) == FOUND
    assert store.waited == [0.5, COMPUTING_CALL_S, COMPUTING_CALL_S, 0.5]


def test_an_answer_that_comes_early_and_is_still_pending_leaves_the_rest_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Scripted([TIERS, FOUND], monkeypatch)
    monkeypatch.setattr(store, "_lookup_within", early(store))

    assert store.wait_lookup(REQUEST, 1.0) == FOUND
    assert store.waited == [1.0, 0.75]


def early(store: Scripted):  # type: ignore[no-untyped-def]
    def look(request: Request, wait_s: float) -> Match:
        store.waited.append(wait_s)
        store.now += 0.25
        return store._answers.pop(0)

    return look


def test_loads_and_peeks_wait_as_long_as_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Scripted([], monkeypatch)

    store.wait(LoadLease(1, 0, 0))
    store.peek(REQUEST)
    store.wait(LoadLease(1, 0, 0), 0.0)

    assert store.waited == [2.0, 0.5, 0.0]
