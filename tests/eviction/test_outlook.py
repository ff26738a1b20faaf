"""The policy that learns what comes back: contract, learning, prefixes, bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from eviction import outlook, visits
from eviction.beliefs import _word
from eviction.outlook import Outlook
from eviction.policy import Ending, EvictionPolicy, Hint, PromptUse
from eviction.ttl import Ttl
from kvstore.testing.contracts.policy import EvictionPolicyContract


@pytest.fixture(autouse=True, params=["as built", "plain"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All tests run on what is compiled, where it is, and on its twin."""
    if request.param == "plain":
        monkeypatch.setattr(outlook, "Visits", visits.Visits)
    return str(request.param)


class TestContract(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Outlook()


class TestContractBelowTtl(EvictionPolicyContract):
    def new_policy(self) -> EvictionPolicy[str]:
        return Ttl(Outlook())


NOTHING_SAID = Ending()


class Requests:
    """Requests as a store plays them on a policy."""

    def __init__(self) -> None:
        self.policy: Outlook[str] = Outlook()
        self._last_id = 0

    def ask(self, path: Sequence[str], now: float, ending: Ending = NOTHING_SAID) -> None:
        """A request for these blocks, which are all resident after it."""
        self.policy.add([name for name in reversed(path) if name not in self.policy], now)
        self.tell(path, now, ending)

    def tell(self, path: Sequence[str], now: float, ending: Ending = NOTHING_SAID) -> None:
        """A request for these blocks has come and gone."""
        self._last_id += 1
        self.policy.used(PromptUse(self._last_id, path), now)
        self.policy.ended(self._last_id, ending, now)

    def evict(self, num: int) -> list[str]:
        victims = self.policy.victims(num)
        self.policy.discard(victims)
        return victims


@pytest.fixture
def requests() -> Requests:
    return Requests()


def as_json(tables: dict[str, Any]) -> str:
    return json.dumps(tables, default=lambda rows: rows.tolist())


def path_of(name: str, num_blocks: int) -> list[str]:
    return [f"{name}.{i}" for i in range(num_blocks)]


def test_what_follows_an_ending_that_never_comes_back_leaves_first(requests: Requests) -> None:
    now = 0.0
    for i in range(400):  # tool calls come back after 30 s, ends of turns never do
        requests.ask(path_of(f"tool{i}", 4), now, Ending("tool_calls"))
        requests.ask(path_of(f"end{i}", 4), now + 1, Ending("stop"))
        requests.ask(path_of(f"tool{i}", 4), now + 30, Ending("stop"))
        now += 40
        requests.evict(max(len(requests.policy) - 60, 0))
    requests.ask(path_of("waiting", 4), now, Ending("tool_calls"))
    requests.ask(path_of("done", 4), now + 2, Ending("stop"))
    others = len(requests.policy) - 8
    order = requests.policy.victims(len(requests.policy))
    assert set(order[-4:]) == set(path_of("waiting", 4)), "older than what is done, and worth more"
    assert others > 0


def test_a_caller_that_says_last_turn_is_believed_as_far_as_it_was_right(requests: Requests) -> None:
    now = 0.0
    for i in range(300):
        requests.ask(path_of(f"a{i}", 4), now)
        requests.ask(path_of(f"b{i}", 4), now + 1, Ending(last_turn=True))
        requests.ask(path_of(f"a{i}", 4), now + 20, Ending(last_turn=True))
        now += 30
        requests.evict(max(len(requests.policy) - 60, 0))
    requests.ask(path_of("goes on", 4), now)
    requests.ask(path_of("is over", 4), now + 1, Ending(last_turn=True))
    assert set(requests.policy.victims(len(requests.policy))[-4:]) == set(path_of("goes on", 4))


def test_a_prompt_leaves_from_its_tail(requests: Requests) -> None:
    requests.ask(path_of("a", 6), 0.0)
    assert requests.evict(4) == ["a.5", "a.4", "a.3", "a.2"]
    assert requests.evict(9) == ["a.1", "a.0"]


def test_a_shared_head_stays_longer_than_what_hangs_on_it(requests: Requests) -> None:
    head = path_of("head", 3)
    for i in range(5):
        requests.ask([*head, f"tail{i}"], float(i))
    order = requests.policy.victims(99)
    assert order[-3:] == ["head.2", "head.1", "head.0"]


def test_without_any_request_told_the_oldest_leave_first(requests: Requests) -> None:
    for i in range(4):
        requests.tell([f"other{i}"], 100.0 * i)
        requests.policy.add([f"k{i}"], 100.0 * i)
    assert requests.policy.victims(4) == ["k0", "k1", "k2", "k3"]


def test_a_held_key_is_no_victim_and_is_remembered(requests: Requests) -> None:
    requests.ask(["a", "b"], 0.0)
    requests.policy.hold(["b"])
    assert requests.policy.victims(9) == ["a"]
    requests.policy.release(["b"], 1.0)
    assert sorted(requests.policy.victims(9)) == ["a", "b"]


def test_pages_of_one_block_share_its_worth() -> None:
    policy: Outlook[tuple[str, int]] = Outlook()
    policy.name_by(lambda key: key[0])
    policy.add([("b", 0), ("b", 1), ("a", 0), ("a", 1)], 0.0)
    policy.used(PromptUse(1, ["a", "b"]), 0.0)
    policy.ended(1, Ending(), 0.0)
    assert policy.victims(9) == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    policy.discard([("b", 0)])
    assert policy.victims(1) == [("b", 1)]


def test_a_lower_priority_leaves_first_whatever_it_is_worth(requests: Requests) -> None:
    requests.policy.add(["high"], 0.0, Hint(priority=5))
    for i in range(20):
        requests.ask(["low"], float(i))
    assert requests.policy.victims(2) == ["low", "high"]


def test_what_left_is_remembered_within_a_bound(requests: Requests) -> None:
    table = requests.policy._table
    table.visits = outlook.Visits(least_ghosts=50)
    for i in range(500):
        requests.ask(path_of(f"p{i}", 4), float(i))
        requests.evict(max(len(requests.policy) - 20, 0))
    assert table.visits.num_remembered <= 24 + 4 * 24
    assert table.visits.num_cohorts <= table.visits.num_remembered
    assert len(table.keys) <= table.visits.num_remembered + 10, "numbers are used again"


def test_a_request_that_never_ends_is_not_awaited_for_ever(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eviction.outlook.MOST_OPEN", 10)
    for i in range(100):
        requests.policy.used(PromptUse(i, [f"k{i}"]), float(i))
    assert len(requests.policy._open) == 10


def test_what_was_learned_survives_a_restart(requests: Requests) -> None:
    for i in range(200):
        requests.ask(path_of(f"a{i}", 3), 40.0 * i, Ending("tool_calls"))
        requests.ask(path_of(f"a{i}", 3), 40.0 * i + 30, Ending("stop"))
    fresh: Outlook[str] = Outlook()
    fresh.restore(requests.policy.tables())
    assert as_json(fresh.tables()) == as_json(requests.policy.tables())


def test_beliefs_say_in_words_what_comes_back_and_how_soon(requests: Requests) -> None:
    for i in range(400):
        requests.ask(path_of(f"tool{i}", 4), 100.0 * i, Ending("tool_use"))
        requests.ask(path_of(f"tool{i}", 4), 100.0 * i + 30, Ending("end_turn", None, 700))
        requests.evict(max(len(requests.policy) - 60, 0))

    beliefs = {one.words: one for one in requests.policy.beliefs(requests.policy.tables())}

    waiting = beliefs["used once", "after tool_use"]
    assert waiting.within[0] > 0.9, "it came back after 30 s, each time"
    assert waiting.mean_s is not None
    assert 20 < waiting.mean_s < 120
    assert waiting.seen == pytest.approx(1600, rel=0.1)
    done = beliefs["used twice", "after end_turn", "turn came after 15 to 45 s", "reply of more than 640 tokens"]
    assert done.within[0] < 0.2
    assert next(iter(beliefs)) == (), "all blocks were seen most"


def test_beliefs_name_every_rank() -> None:
    features = [500, 501, 502, 505, 400, 401, 200, 205, 100, 199, 0, 1, 5, visits.BRANCH, visits.NEW]

    words = [_word(feature, {0: "stop"}) for feature in features]

    assert words == [
        "used once", "used twice", "used 3 to 4 times", "used more than 32 times", "said to be the last turn",
        "said to go on",
        "reply of up to 16 tokens", "reply of more than 640 tokens",
        "after stop", "after another end", "turn came within 5 s", "turn came after 5 to 15 s",
        "turn came after more than 400 s",
        "branch of another", "new prompt",
    ]  # fmt: skip


def test_after_a_restart_a_finish_reason_means_what_it_meant(requests: Requests) -> None:
    for i in range(200):
        requests.ask(path_of(f"a{i}", 3), 100.0 * i, Ending("stop"))
        requests.ask(path_of(f"b{i}", 3), 100.0 * i + 1, Ending("tool_calls"))
        requests.ask(path_of(f"b{i}", 3), 100.0 * i + 30, Ending("stop"))
        requests.evict(max(len(requests.policy) - 60, 0))
    after = Requests()
    after.policy.restore(requests.policy.tables())
    after.ask(path_of("waiting", 3), 0.0, Ending("tool_calls"))  # another order of first use than before
    after.ask(path_of("done", 3), 1.0, Ending("stop"))
    assert set(after.policy.victims(3)) == set(path_of("done", 3))


def test_tables_are_taken_in_while_keys_are_there(requests: Requests) -> None:
    """A store that starts finds its pages on disk first, and what it had learned after that."""
    requests.ask(path_of("a", 3), 0.0)
    policy: Outlook[str] = Outlook()
    policy.add(["old", "new"], 0.0)
    policy.add(["high"], 0.0, Hint(priority=5))
    policy.restore(requests.policy.tables())
    assert policy.victims(9) == ["old", "new", "high"]
    assert as_json(policy.tables()) == as_json(requests.policy.tables())


def test_tables_without_reasons_are_refused() -> None:
    policy: Outlook[str] = Outlook()
    tables = policy.tables()
    del tables["finish_reasons"]
    with pytest.raises(ValueError, match="finish_reasons"):
        policy.restore(tables)


def test_what_an_exception_left_half_done_is_put_right(requests: Requests) -> None:
    requests.ask(path_of("a", 4), 0.0)
    del requests.policy._table.keys[2:]  # as if interrupted between two books
    requests.policy.rebuild([(name, Hint()) for name in path_of("b", 3)], 1.0)
    requests.ask(path_of("b", 3), 2.0)
    assert sorted(requests.policy.victims(9)) == path_of("b", 3)


def test_callers_that_make_up_finish_reasons_fill_no_memory(requests: Requests) -> None:
    for i in range(100):
        requests.ask(path_of("a", 2), float(i), Ending(f"reason {i}"))
    assert len(requests.policy.tables()["finish_reasons"]) == visits.MOST_REASONS


def learned(requests: Requests) -> Outlook[str]:
    """A policy that has seen conversations come back within ten seconds, and prompts that are asked once."""
    for i in range(60):
        now = 100.0 * i
        requests.ask(path_of(f"talk{i}", 4), now)
        for turn in range(1, 5):
            requests.ask(path_of(f"talk{i}", 4 + turn), now + 10.0 * turn)
        for number in range(3):
            requests.ask(path_of(f"once{i}.{number}", 4), now + 50.0)
        requests.evict(max(len(requests.policy) - 40, 0))
    return requests.policy


def test_what_is_new_does_not_push_out_what_comes_back(requests: Requests) -> None:
    policy = learned(requests)
    now = 6000.0
    talk = path_of("talk", 8)
    for length in (5, 6, 7, 8):
        requests.ask(talk[:length], now + 10.0 * (length - 5))
    now += 31.0
    once, turn = path_of("once", 3), [*talk, "next", "last"]

    policy.used(PromptUse(7001, once), now)
    policy.used(PromptUse(7002, turn), now)

    assert policy.num_worthy(7001, once, talk[:3], now) == 0
    assert policy.num_worthy(7002, turn[8:], path_of("once59.2", 2), now) == 2
    assert policy.num_worthy(7001, once, [], now) == 3
    assert policy.num_worthy(9999, once, talk[:3], now) == 3  # a request that it was never told of


def test_a_victim_that_was_told_to_leave_or_has_a_lower_priority_is_worth_nothing(requests: Requests) -> None:
    policy = learned(requests)
    talk, once, now = path_of("talk", 8), path_of("once", 3), 6000.0
    for length in (5, 6, 7, 8):
        requests.ask(talk[:length], now + 10.0 * (length - 5))
    policy.used(PromptUse(7001, once), now + 31.0)

    assert policy.num_worthy(7001, once, talk[-3:], now + 31.0, priority=1) == 3
    policy.demote(talk[-2:])
    assert policy.num_worthy(7001, once, talk[:-4:-1], now + 31.0) == 2
