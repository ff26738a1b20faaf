from __future__ import annotations

from kvstore.hints.outcome import HintOutcome, HintStatus


def test_an_answer_leaves_out_what_it_has_nothing_to_say_about() -> None:
    shared = HintOutcome("a", "share", HintStatus.ACCEPTED)
    pinned = HintOutcome("b", "pin", HintStatus.CLIPPED, tokens=128, until=1000.5, reason="the budget is full")

    assert shared.as_json() == {"action_id": "a", "action": "share", "status": "accepted"}
    assert pinned.as_json() == {
        "action_id": "b",
        "action": "pin",
        "status": "clipped",
        "tokens": 128,
        "until": 1000.5,
        "reason": "the budget is full",
    }
