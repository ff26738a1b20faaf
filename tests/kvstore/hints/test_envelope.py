"""Messages of hints: what is read, what is refused, and that nothing which is sent raises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.hints.actions import HintAction, HintKind
from kvstore.hints.envelope import HintEnvelope, parse
from kvstore.hints.limits import HintLimits
from kvstore.hints.outcome import HintOutcome, HintStatus

LIMITS = HintLimits(max_actions=4, max_tokens=1000, max_bytes=10_000, default_ttl_s=30.0, max_ttl_s=60.0)


def message(*payloads: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A message of Pins, one for each payload."""
    actions = [
        {"action_id": str(index), "action_type": "pin", "action_version": "1.0", "payload": payload} | fields
        for index, payload in enumerate(payloads)
    ]
    return {"protocol_version": "1.0", "message_id": "m", "actions": actions}


def read(*payloads: dict[str, Any], **fields: Any) -> Any:
    """What becomes of a message of one action."""
    (item,) = parse(message(*payloads, **fields), LIMITS).items
    return item


@dataclass(frozen=True)
class Struct:
    """An engine's own message, or an action of it."""

    protocol_version: Any = "1.0"
    message_id: Any = "m"
    actions: Any = ()
    action_id: Any = "a"
    action_type: Any = "pin"
    action_version: Any = "1.0"
    payload: Any = None


def test_json_a_dict_and_an_engines_struct_are_read_alike() -> None:
    payload = {"tokens": [1, 2, 3], "start": 1, "end": 3, "ttl_s": 10, "session": "s"}
    sent = message(payload)
    struct = Struct(actions=[Struct(action_id="0", payload=payload)])
    expected = HintEnvelope("m", [HintAction("0", HintKind.PIN, [1, 2, 3], None, 1, 3, 10.0, False, 50, "s")])

    assert parse(sent, LIMITS) == expected
    assert parse(json.dumps(sent), LIMITS) == expected
    assert parse(json.dumps(sent).encode(), LIMITS) == expected
    assert parse(struct, LIMITS) == expected


@pytest.mark.parametrize("word", ["pin", "Pin", "PIN", "kv.pin", "KV.Pin"])
def test_an_action_is_known_by_its_word(word: str) -> None:
    assert read({}, action_type=word).kind is HintKind.PIN


def test_what_says_no_time_gets_the_usual_one_and_what_says_too_long_the_longest() -> None:
    assert (read({}).ttl_s, read({}).is_clipped) == (30.0, False)
    assert (read({"duration_s": 60}).ttl_s, read({"duration_s": 60}).is_clipped) == (60.0, False)
    assert (read({"ttl_s": 61}).ttl_s, read({"ttl_s": 61}).is_clipped) == (60.0, True)


def test_block_hashes_are_read_as_bytes() -> None:
    assert read({"block_hashes": ["00ff", "0A"]}).hashes == [b"\x00\xff", b"\x0a"]


def test_tokens_may_be_an_array() -> None:
    tokens = np.arange(5)

    assert read({"tokens": tokens}).tokens is tokens


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"ttl_s": -1}, "ttl_s"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": float("nan")}, "ttl_s"),
        ({"ttl_s": float("inf")}, "ttl_s"),
        ({"ttl_s": "60"}, "ttl_s"),
        ({"ttl_s": 10**400}, ""),
        ({"ttl_s": 1, "duration_s": 2}, "either"),
        ({"tll_s": 60}, "tll_s"),
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"start": -1}, "start"),
        ({"start": 5, "end": 5}, "empty"),
        ({"end": 1 << 32}, "end"),
        ({"session": "s" * 65}, "session"),
        ({"session": "\ud800"}, "session"),
        ({"\ud800": 1}, ""),
        ({"tokens": [1], "block_hashes": ["00"]}, "either"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": {"a": 1}}, "tokens"),
        ({"tokens": 5}, "tokens"),
        ({"tokens": [0] * 1001}, "1001 tokens"),
        ({"block_hashes": []}, "no hash"),
        ({"block_hashes": [0] * 1001}, "1001 blocks"),
        ({"block_hashes": [""]}, "empty"),
        ({"block_hashes": ["xy"]}, "hexadecimal"),
        ({"block_hashes": ["0" * 130]}, "block_hashes"),
        ({"start": {"deep": [{}]}}, "start"),
        ([], "object"),
    ],
)
def test_a_payload_that_is_none_is_rejected_with_the_reason(payload: Any, reason: str) -> None:
    outcome = read(payload)

    assert isinstance(outcome, HintOutcome)
    assert (outcome.action_id, outcome.action, outcome.status) == ("0", "pin", HintStatus.REJECTED)
    assert reason in outcome.reason
    assert len(outcome.reason) <= 200
    assert "\n" not in outcome.reason


@pytest.mark.parametrize(
    "fields",
    [
        {"action_type": "teleport"},
        {"action_type": "kv.fetch"},
        {"action_type": None},
        {"action_version": "2.0"},
        {"action_version": None},
        {"action_version": 1},
    ],
)
def test_an_unknown_type_or_version_is_ignored(fields: dict[str, Any]) -> None:
    assert read({}, **fields).status is HintStatus.IGNORED


def test_a_message_of_another_protocol_is_ignored_action_by_action() -> None:
    sent = message({}, {}) | {"protocol_version": "2.0"}

    assert [item.status for item in parse(sent, LIMITS).items] == [HintStatus.IGNORED] * 2  # type: ignore[union-attr]


def test_an_id_that_no_answer_could_repeat_is_rejected() -> None:
    outcome = read({}, action_id="\ud800")

    assert isinstance(outcome, HintOutcome)
    assert (outcome.action_id, outcome.status) == ("", HintStatus.REJECTED)


def test_actions_beyond_the_most_are_rejected_and_the_first_ones_are_read() -> None:
    items = parse(message(*[{}] * 6), LIMITS).items

    assert [isinstance(item, HintAction) for item in items] == [True] * 4 + [False] * 2
    assert "an envelope may have 4" in items[-1].reason  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 9_000, "deep"),
        (b" " * 10_001, "10001 bytes"),
        (b"null", "protocol_version"),
        (None, "protocol_version"),
        (7, "protocol_version"),
        ({"protocol_version": "1"}, "actions"),
        ({"protocol_version": "1", "actions": {}}, "actions"),
        ({"protocol_version": "1" * 129, "actions": []}, "protocol_version"),
        ({"protocol_version": "1", "message_id": 5, "actions": []}, "message_id"),
        ({"protocol_version": "1", "message_id": "\ud800", "actions": []}, "message_id"),
    ],
)
def test_what_is_no_message_is_rejected_as_a_whole(sent: object, reason: str) -> None:
    (outcome,) = parse(sent, LIMITS).items

    assert isinstance(outcome, HintOutcome)
    assert (outcome.action, outcome.status) == ("envelope", HintStatus.REJECTED)
    assert reason in outcome.reason


def test_an_object_that_raises_when_it_is_looked_at_is_rejected() -> None:
    class Trap:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("boo")

    (outcome,) = parse(Trap(), LIMITS).items

    assert isinstance(outcome, HintOutcome)
    assert outcome.reason == "it cannot be read: RuntimeError"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(
    ["tokens", "block_hashes", "start", "end", "ttl_s", "duration_s", "priority", "session", "other"]
)
actions = st.fixed_dictionaries(
    {},
    optional={
        "action_id": st.text(max_size=4) | values,
        "action_type": st.sampled_from([kind.value for kind in HintKind]) | values,
        "action_version": st.sampled_from(["1", "1.0", "2"]) | values,
        "payload": st.dictionaries(fields, values, max_size=4) | values,
    },
)
messages = (
    st.fixed_dictionaries(
        {"protocol_version": st.just("1.0"), "actions": st.lists(actions | values, max_size=6)},
        optional={"message_id": values},
    )
    | values
)


@settings(max_examples=200, deadline=None)
@given(messages)
def test_whatever_is_sent_is_answered(sent: Any) -> None:
    for item in parse(sent, LIMITS).items:
        if isinstance(item, HintAction):
            assert 0 < item.ttl_s <= LIMITS.max_ttl_s
            assert 0 <= item.priority <= 100
            assert item.end is None or item.start < item.end
        else:
            assert item.status in (HintStatus.REJECTED, HintStatus.IGNORED)
            assert item.reason
