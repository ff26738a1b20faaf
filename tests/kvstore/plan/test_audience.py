"""Policies are told of each request once, and of its end."""

from __future__ import annotations

from dataclasses import replace

from eviction.lru import Lru
from eviction.policy import Ending, PromptUse
from eviction.registry import make_policy
from eviction.ttl import Ttl
from kvstore.plan.planner import Planner
from kvstore.plan.records import PlanSettings, RequestOptions
from kvstore.plan.state import Page
from kvstore.plan.tier_plan import TierPlan
from tests.helpers.clocks import Clocks
from tests.helpers.planners import LAYOUT, land, path, save


class Listening(Lru[Page]):
    """LRU that writes down what it is told: a Use or the end of one, when, and how many pages it had then."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[object, float, int]] = []

    def used(self, use: PromptUse, now: float) -> None:
        self.heard.append((use._replace(path=list(use.path)), now, len(self)))

    def ended(self, request_id: int, ending: Ending, now: float) -> None:
        self.heard.append(((request_id, ending), now, len(self)))


def make(host: Listening, disk: Listening, clocks: Clocks) -> Planner:
    plan = TierPlan("disk", 32, Ttl(disk), is_indexed=True, is_shared=False)
    return Planner(LAYOUT, PlanSettings(16, load_or_recompute=False), Ttl(host), [plan], clocks)


def test_a_request_is_told_once_with_its_whole_prompt_however_often_it_is_looked_up() -> None:
    host, disk, clocks = Listening(), Listening(), Clocks()
    planner = make(host, disk, clocks)
    request = path(0, 3)
    request.options = RequestOptions(session="chat")

    for _ in range(3):
        planner.lookup(request, clocks.now)
    save(planner, request)
    planner.finished(request, clocks.now, finish_reason="tool_calls")
    land(planner)

    use, end = PromptUse(request.id, request.keys, "chat", None), (request.id, Ending("tool_use", None))
    assert [(told, now) for told, now, _ in host.heard] == [(use, clocks.up), (end, clocks.up)]
    assert [(told, now) for told, now, _ in disk.heard] == [(use, clocks.unix), (end, clocks.unix)]
    assert host.heard[0][2] == 0, "before any of its pages comes"


def test_a_request_that_nobody_looked_up_is_told_by_its_save() -> None:
    host = Listening()
    planner = make(host, Listening(), Clocks())

    save(planner, path(0, 2))

    assert [(type(told), members) for told, _, members in host.heard] == [(PromptUse, 0)]


def test_a_last_turn_that_is_known_beforehand_is_told_with_the_request() -> None:
    host = Listening()
    planner = make(host, Listening(), Clocks())
    request = replace(path(0, 2), options=RequestOptions(last_turn=True))

    planner.lookup(request, 0.0)
    planner.finished(request, 0.0)

    (use, _, _), (end, _, _) = host.heard
    assert isinstance(use, PromptUse)
    assert use.last_turn
    assert end == (request.id, Ending("", True))


def test_a_request_whose_client_died_has_ended() -> None:
    host = Listening()
    planner = make(host, Listening(), Clocks())
    request = path(0, 2)
    planner.lookup(request, 0.0)

    planner.abandon(request, 0.0)
    planner.abandon(request, 0.0)

    assert [told for told, _, _ in host.heard[1:]] == [(request.id, Ending("cancelled"))]


def test_a_prefetch_is_no_request() -> None:
    host = Listening()
    planner = make(host, Listening(), Clocks())

    planner.prefetch(path(0, 2), 0.0)

    assert host.heard == []


def test_a_tier_that_comes_later_is_told_too() -> None:
    late = Listening()
    planner = make(Listening(), Listening(), Clocks())
    planner.attach_tier(TierPlan("late", 8, Ttl(late), is_indexed=True, is_shared=False))

    planner.lookup(path(0, 2), 0.0)

    assert len(late.heard) == 1


def test_policies_that_do_not_care_are_told_nothing() -> None:
    assert not make_policy("lru").listens
    assert Ttl(Listening()).listens
