"""From the store's events to vLLM's: nothing is taken back that was not announced, nothing announced twice."""

from __future__ import annotations

import pytest

from connectors.vllm import events
from connectors.vllm.events import Announcer, News
from kvstore.plan.journal import BlockEvent, Event
from radix.hashing import BlockHash

KEYS = [BlockHash(bytes([n]) * 32) for n in range(6)]
NAMES = [b"vllm" + bytes([n]) for n in range(6)]


def came(*blocks: int, tier: str = "host", group: int = 0) -> BlockEvent:
    return BlockEvent(Event.STORED, 0.0, tier, group, tuple(KEYS[n] for n in blocks))


def left(*blocks: int, tier: str = "host", group: int = 0) -> BlockEvent:
    return BlockEvent(Event.REMOVED, 0.0, tier, group, tuple(KEYS[n] for n in blocks))


@pytest.fixture
def announcer() -> Announcer:
    announcer = Announcer((0,))
    announcer.name(KEYS[:4], NAMES[:4])
    return announcer


def test_blocks_are_told_by_vllms_hashes_and_media(announcer: Announcer) -> None:
    news = announcer.tell([came(0), came(1), came(0, 1, tier="disk"), left(0), left(0, tier="disk")])

    assert news == [
        News(True, "CPU", None, NAMES[:2]),
        News(True, "STORAGE", None, NAMES[:2]),
        News(False, "CPU", None, NAMES[:1]),
        News(False, "STORAGE", None, NAMES[:1]),
    ]


def test_what_was_not_announced_is_not_taken_back(announcer: Announcer) -> None:
    assert announcer.tell([left(0), came(5), left(5), left(5), came(1, tier="redis")]) == []
    announcer.name(KEYS[5:], NAMES[5:])
    assert announcer.tell([]) == []


def test_a_block_is_announced_once_per_place(announcer: Announcer) -> None:
    assert announcer.tell([came(0), came(0)]) == [News(True, "CPU", None, NAMES[:1])]
    assert announcer.tell([left(0), left(0)]) == [News(False, "CPU", None, NAMES[:1])]


def test_a_block_that_comes_again_is_announced_again(announcer: Announcer) -> None:
    announcer.tell([came(0), left(0)])

    assert announcer.tell([came(0)]) == [News(True, "CPU", None, NAMES[:1])]


def test_groups_have_vllms_numbers() -> None:
    announcer = Announcer((1, 4))
    announcer.name(KEYS[:1], NAMES[:1])

    news = announcer.tell([came(0, group=1), came(0, group=0), left(0, group=1)])

    assert [(one.is_stored, one.group) for one in news] == [(True, 4), (True, 1), (False, 4)]


def test_names_of_blocks_that_are_nowhere_are_bounded(monkeypatch: pytest.MonkeyPatch, announcer: Announcer) -> None:
    monkeypatch.setattr(events, "MAX_NAMES", 2)
    announcer.tell([came(0, 1)])
    announcer.name(KEYS[4:], NAMES[4:])

    assert announcer.tell([left(0, 1)]) == [News(False, "CPU", None, NAMES[:2])]  # announced: kept until taken back
    assert len(announcer._names) == 2
    assert announcer.tell([came(5), came(2)]) == []  # the oldest names are gone


def test_after_a_reset_nothing_is_taken_back(announcer: Announcer) -> None:
    announcer.tell([came(0)])
    announcer.forget()

    assert announcer.tell([left(0), came(0)]) == []


def test_what_others_stored_is_announced_when_a_request_names_it(announcer: Announcer) -> None:
    assert announcer.tell([came(4), came(5), came(4, 5, tier="disk"), left(5), came(0)]) == [
        News(True, "CPU", None, NAMES[:1])
    ]

    announcer.name(KEYS[4:], NAMES[4:])
    news = announcer.tell([left(4)])

    assert sorted(news[:-1]) == [News(True, "CPU", None, NAMES[4:5]), News(True, "STORAGE", None, NAMES[4:])]
    assert news[-1] == News(False, "CPU", None, NAMES[4:5])
    assert announcer.tell([]) == []


def test_what_nobody_here_named_is_bounded(monkeypatch: pytest.MonkeyPatch, announcer: Announcer) -> None:
    monkeypatch.setattr(events, "MAX_UNNAMED", 1)
    announcer.tell([came(4), came(5)])

    announcer.name(KEYS[4:], NAMES[4:])

    assert announcer.tell([]) == [News(True, "CPU", None, NAMES[5:])]


@pytest.mark.parametrize("kind", [Event.CLEARED, Event.DROPPED])
def test_when_events_were_lost_everything_is_taken_back(announcer: Announcer, kind: Event) -> None:
    announcer.tell([came(0, 1), came(1, tier="disk"), came(5)])

    news = announcer.tell([BlockEvent(kind, 0.0), left(0), came(1)])

    assert sorted(news[:-1]) == [News(False, "CPU", None, NAMES[:2]), News(False, "STORAGE", None, NAMES[1:2])]
    assert news[-1] == News(True, "CPU", None, NAMES[1:2])
    announcer.name(KEYS[5:], NAMES[5:])
    assert announcer.tell([]) == []
