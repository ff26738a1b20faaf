"""The waiting lines of a lane."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.move.backlog import Backlog
from kvstore.plan.records import Op, Priority, Transfer
from kvstore.testing.pages import key_of


def transfer(transfer_id: int, priority: Priority = Priority.LOAD, deadline: float = 10.0) -> Transfer:
    return Transfer(transfer_id, Op.PROBE, "memory", (key_of(transfer_id),), priority, deadline)


def ids(backlog: Backlog) -> list[int]:
    popped = []
    while (t := backlog.pop()) is not None:
        popped.append(t.id)
    return popped


def test_priority_goes_before_arrival_and_arrival_decides_within_one_priority() -> None:
    backlog = Backlog(8)
    for number, priority in enumerate(
        [Priority.SAVE, Priority.PREFETCH, Priority.LOAD, Priority.SAVE, Priority.LOAD, Priority.PREFETCH]
    ):
        assert backlog.push(transfer(number, priority))

    assert ids(backlog) == [2, 4, 1, 5, 0, 3]


def test_a_full_line_of_saves_leaves_room_for_a_load() -> None:
    backlog = Backlog(2)

    pushed = [backlog.push(transfer(i, Priority.SAVE)) for i in range(3)]

    assert pushed == [True, True, False]
    assert backlog.push(transfer(3, Priority.LOAD))
    assert len(backlog) == 3


def test_a_priority_can_be_held_back() -> None:
    backlog = Backlog(4)
    backlog.push(transfer(1, Priority.SAVE))

    assert backlog.pop(without=(Priority.SAVE,)) is None
    assert len(backlog) == 1


def test_only_what_is_past_its_deadline_expires() -> None:
    backlog = Backlog(4)
    for number, deadline in ((1, 5.0), (2, 6.0), (3, float("inf"))):
        backlog.push(transfer(number, deadline=deadline))

    assert [t.id for t in backlog.remove_expired(5.0)] == [1]
    assert ids(backlog) == [2, 3]


def test_a_promoted_prefetch_goes_behind_the_loads_that_wait_and_before_the_other_prefetches() -> None:
    backlog = Backlog(4)
    for number, priority in enumerate([Priority.PREFETCH, Priority.PREFETCH, Priority.LOAD, Priority.SAVE]):
        backlog.push(transfer(number, priority))

    for transfer_id in (1, 2, 3, 99):
        backlog.promote(transfer_id)

    assert ids(backlog) == [2, 1, 0, 3]


STEPS = ["push", "push", "pop", "remove", "promote", "expire", "clear"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11))))
def test_whatever_happens_each_transfer_comes_out_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    backlog = Backlog(3)
    waiting: list[Transfer] = []  # in the order of arrival in its line
    promoted: set[int] = set()

    def line_of(t: Transfer) -> Priority:
        return Priority.LOAD if t.id in promoted else t.priority

    for number, (step, choice) in enumerate(steps):
        match step:
            case "push":
                new = transfer(number, Priority(choice % 3), deadline=float(choice))
                has_room = sum(line_of(t) is new.priority for t in waiting) < 3
                assert backlog.push(new) is has_room
                waiting += [new] if has_room else []
            case "pop":
                expected = min(waiting, key=line_of, default=None)
                assert backlog.pop() == expected
                waiting = [t for t in waiting if t is not expected]
            case "remove":
                chosen = waiting[choice % len(waiting)] if waiting else None
                assert backlog.remove(chosen.id if chosen else -1) == chosen
                waiting = [t for t in waiting if t is not chosen]
            case "promote":
                chosen = waiting[choice % len(waiting)] if waiting else None
                backlog.promote(chosen.id if chosen else -1)
                if chosen is not None and line_of(chosen) is Priority.PREFETCH:
                    promoted.add(chosen.id)
                    waiting = [t for t in waiting if t is not chosen] + [chosen]
            case "expire":
                expired = backlog.remove_expired(float(choice))
                assert sorted(t.id for t in expired) == sorted(t.id for t in waiting if t.deadline <= choice)
                waiting = [t for t in waiting if t.deadline > choice]
            case "clear":
                assert sorted(t.id for t in backlog.clear()) == sorted(t.id for t in waiting)
                waiting = []
        assert len(backlog) == len(waiting)
