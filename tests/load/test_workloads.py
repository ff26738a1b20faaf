from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.load.requests import CHAT, COMPLETIONS, PlannedRequest, Workload, as_text
from kvstore.load.workloads import RECIPES, LongDoc, MultiRound, NoReuse, SharedPrompt, warm_up


def prompts(workload: Workload, answers: dict[int, str] | None = None) -> list[str]:
    """Every prompt as one text."""
    given = {request.number: f"answer {request.number}" for request in workload.requests}
    made = [workload.messages(request, given if answers is None else answers) for request in workload.requests]
    return [as_text(messages) for messages in made if messages is not None]


def document(request: PlannedRequest) -> str:
    assert isinstance(request.prompt, tuple)
    return request.prompt[0].content.partition("\n\n")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_equal_seeds_make_equal_requests(name: str) -> None:
    assert RECIPES[name]().make(3) == RECIPES[name]().make(3)


@pytest.mark.parametrize("name", RECIPES)
def test_another_seed_shares_no_prompt(name: str) -> None:
    ours, others = prompts(RECIPES[name]().make(3)), prompts(RECIPES[name]().make(4))

    assert {text[:40] for text in ours}.isdisjoint(text[:40] for text in others)


@pytest.mark.parametrize("name", RECIPES)
def test_requests_are_numbered_and_continue_earlier_ones_of_their_conversation(name: str) -> None:
    requests = RECIPES[name]().make(0).requests

    assert [request.number for request in requests] == list(range(len(requests)))
    for request in requests:
        if request.after is not None:
            assert request.after < request.number
            assert requests[request.after].conversation == request.conversation
            assert not requests[request.after].last


def test_shared_prompt_has_one_system_prompt_and_different_questions() -> None:
    workload = SharedPrompt(requests=6, system_tokens=200).make(0)

    systems = {request.prompt[0] for request in workload.requests if isinstance(request.prompt, tuple)}
    questions = {request.prompt[1] for request in workload.requests if isinstance(request.prompt, tuple)}
    assert [message.role for message in systems] == ["system"]
    assert len(questions) == 6
    assert workload.api == CHAT


def test_every_round_of_a_user_begins_with_the_round_before_and_its_answer() -> None:
    workload = MultiRound(users=2, rounds=3, system_tokens=50, history_tokens=50).make(0)
    answers = {number: f"the answer to {number}" for number in range(6)}

    for request in workload.requests:
        messages = workload.messages(request, answers)
        assert messages is not None
        if request.after is not None:
            before = workload.messages(workload.requests[request.after], answers)
            assert before is not None
            assert messages[: len(before)] == before
            assert messages[len(before)].content == answers[request.after]
            assert messages[len(before)].role == "assistant"
    assert len({text.partition("\n\n")[0] for text in prompts(workload)}) == 1, "one system prompt for all"


def test_users_take_turns_and_share_no_history() -> None:
    workload = MultiRound(users=3, rounds=2, system_tokens=0).make(0)

    assert [request.conversation for request in workload.requests] == [0, 1, 2, 0, 1, 2]
    assert [request.part for request in workload.requests] == ["round 1"] * 3 + ["round 2"] * 3
    assert [request.last for request in workload.requests] == [False] * 3 + [True] * 3
    assert len({text[:30] for text in prompts(workload)[:3]}) == 3


def test_a_prompt_whose_conversation_lacks_an_answer_cannot_be_made() -> None:
    workload = MultiRound(users=1, rounds=3).make(0)

    assert workload.body(workload.requests[2], {0: "there"}, CHAT) is None
    assert workload.body(workload.requests[1], {0: "there"}, CHAT) is not None


@pytest.mark.parametrize(("order", "expected"), [("tile", [0, 1, 2, 0, 1, 2]), ("interleave", [0, 0, 1, 1, 2, 2])])
def test_documents_are_asked_about_in_order(order: str, expected: list[int]) -> None:
    workload = LongDoc(documents=3, document_tokens=40, asks=2, order=order).make(0)
    texts = [document(request) for request in workload.requests]

    first_met = list(dict.fromkeys(texts))

    assert [first_met.index(text) for text in texts] == expected
    assert len(set(prompts(workload))) == 6, "every question is another one"


def test_random_order_asks_as_often_and_in_an_order_of_its_seed() -> None:
    orders = [
        [
            document(request)
            for request in LongDoc(documents=5, document_tokens=20, asks=3, order="random").make(s).requests
        ]
        for s in (1, 1, 2)
    ]

    assert orders[0] == orders[1]
    assert sorted(orders[0].count(text) for text in set(orders[0])) == [3] * 5


@pytest.mark.parametrize(("ratio", "hits"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_the_promised_share_of_later_questions_can_hit(ratio: float, hits: int) -> None:
    workload = LongDoc(documents=4, document_tokens=20, asks=4, hit_ratio=ratio).make(0)
    seen: set[str] = set()
    found = 0
    for request in workload.requests:
        found += document(request) in seen
        seen.add(document(request))

    assert found == hits
    assert sum(request.part == "asked again" for request in workload.requests) == hits


def test_prompts_of_no_reuse_have_different_heads() -> None:
    workload = NoReuse(requests=50, prompt_tokens=30).make(0)

    assert len({text[:20] for text in prompts(workload)}) == 50
    assert workload.api == COMPLETIONS


def test_warm_up_shares_nothing_with_the_workloads() -> None:
    warm = {text[:30] for text in prompts(warm_up(5, 0))}

    assert len(warm) == 5
    for recipe in RECIPES.values():
        assert warm.isdisjoint(text[:30] for text in prompts(recipe().make(0)))
    assert warm_up(0, 0).requests == ()


def test_conversation_becomes_text_for_a_model_without_chats() -> None:
    workload = MultiRound(users=1, rounds=2, system_tokens=3, history_tokens=0, question_tokens=2).make(0)

    body = workload.body(workload.requests[1], {0: "yes"}, COMPLETIONS)

    assert body is not None
    lines = body["prompt"].split("\n\n")
    assert [line.partition(":")[0] for line in lines[1:]] == ["User", "Assistant", "User", "Assistant"]
    assert "Assistant: yes" in lines


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (SharedPrompt(requests=0), "requests = 0"),
        (MultiRound(rounds=-1), "rounds = -1"),
        (LongDoc(order="sideways"), "tile, random, interleave"),
        (LongDoc(hit_ratio=1.5), "between 0 and 1"),
        (LongDoc(hit_ratio=-0.5), "hit_ratio = -0.5"),
        (NoReuse(prompt_tokens=0), "prompt_tokens = 0"),
    ],
)
def test_wrong_parameter_is_named_with_what_would_be_right(recipe: SharedPrompt, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe.make(0)
