"""Prompts of every shape, with vLLM's own cache emptied before each: the same tokens as without us, and a real hit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)
LONG = make_prompt(1200, 11)


@pytest.fixture(scope="module", params=["auto", "async"])
def engine(request: pytest.FixtureRequest, open_engine: Callable[..., Engine]) -> Engine:
    return open_engine({"load": request.param, "save": "all"})


def check(engine: Engine, reference: Reference, prompt: list[int], cached: int, max_tokens: int = 8) -> list[int]:
    """Ask for a prompt, with only the store to help, and compare."""
    engine.forget_own_cache()
    answer = engine.ask(prompt, max_tokens)
    reference.check([answer], [prompt])
    assert answer["cached"] == cached
    engine.settle()
    return list(answer["tokens"])


def test_a_prompt_is_computed_once(engine: Engine, reference: Reference) -> None:
    prompt = make_prompt(900, 21)

    check(engine, reference, prompt, 0)
    check(engine, reference, prompt, 899 // BLOCK * BLOCK)


@pytest.mark.parametrize("shared", [BLOCK - 1, BLOCK, 10 * BLOCK, 10 * BLOCK + 7])
def test_a_fork_takes_the_whole_blocks_it_shares(engine: Engine, reference: Reference, shared: int) -> None:
    engine.ask(LONG)

    check(engine, reference, LONG[:shared] + make_prompt(100, shared), shared // BLOCK * BLOCK)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_prompt_at_a_block_boundary_computes_its_last_token(engine: Engine, reference: Reference, extra: int) -> None:
    engine.ask(LONG)
    prompt = LONG[: 20 * BLOCK + extra]

    # Loaded aside, it has that token computed alone; beside its forward, the block that the token is in.
    is_aside = engine.half._config.fields.load == "async"
    check(engine, reference, prompt, len(prompt) // BLOCK * BLOCK if is_aside else (len(prompt) - 1) // BLOCK * BLOCK)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK])
def test_a_prompt_without_a_whole_block_before_its_end_is_computed(
    engine: Engine, reference: Reference, length: int
) -> None:
    prompt = make_prompt(length, 31 + length)

    check(engine, reference, prompt, 0)
    check(engine, reference, prompt, 0)


def test_a_conversation_takes_what_was_answered_too(engine: Engine, reference: Reference) -> None:
    prompt = make_prompt(500, 41)
    cached = 0
    for turn in range(4):
        answer = check(engine, reference, prompt, cached, max_tokens=40)
        # The last token of an answer is not computed, so its block is saved only if another token followed.
        cached = (len(prompt) + len(answer) - 1) // BLOCK * BLOCK
        prompt = prompt + answer + make_prompt(50, 50 + turn)


def test_what_vllm_has_itself_is_not_loaded_again(engine: Engine, reference: Reference) -> None:
    prompt = make_prompt(790, 61)
    check(engine, reference, prompt, 0)
    engine.forget_own_cache()
    engine.ask(prompt[:400])
    loaded = engine.half.counters["loaded_tokens"]

    answer = engine.ask(prompt)

    reference.check([answer], [prompt])
    assert answer["cached"] == 789 // BLOCK * BLOCK
    assert engine.half.counters["loaded_tokens"] - loaded == 789 // BLOCK * BLOCK - 399 // BLOCK * BLOCK


def test_many_requests_at_once_get_their_own_pages(engine: Engine, reference: Reference) -> None:
    prompts = [LONG[: 100 * n] + make_prompt(30, 70 + n) for n in range(1, 11)]
    engine.generate(prompts)
    engine.forget_own_cache()

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert all(answer["cached"] >= 100 * n // BLOCK * BLOCK for n, answer in enumerate(answers, 1))


def test_of_many_requests_with_a_common_head_one_loads_it(engine: Engine, reference: Reference) -> None:
    head = make_prompt(20 * BLOCK, 101)
    prompts = [head + make_prompt(40 + n, 102 + n) for n in range(6)]
    check(engine, reference, prompts[0], 0)
    engine.forget_own_cache()
    loaded = engine.half.counters["loaded_tokens"]

    answers = engine.generate(prompts)

    reference.check(answers, prompts)
    assert all(answer["cached"] >= len(head) for answer in answers)
    assert len(head) <= engine.half.counters["loaded_tokens"] - loaded < 2 * len(head)


def test_tenants_do_not_share(engine: Engine, reference: Reference) -> None:
    prompt = make_prompt(300, 81)
    engine.ask(prompt, cache_salt="one")
    engine.forget_own_cache()

    assert engine.ask(prompt, cache_salt="two")["cached"] == 0
    engine.forget_own_cache()
    assert engine.ask(prompt, cache_salt="one")["cached"] == 299 // BLOCK * BLOCK


def test_a_reset_forgets_what_was_stored(engine: Engine, reference: Reference) -> None:
    prompt = make_prompt(300, 91)
    engine.ask(prompt)
    engine.forget_own_cache()
    assert engine.llm.reset_prefix_cache(reset_connector=True)

    check(engine, reference, prompt, 0)
    check(engine, reference, prompt, 299 // BLOCK * BLOCK)


def test_nothing_is_held_when_all_is_quiet(engine: Engine) -> None:
    engine.settle()
    stats = engine.half.store.stats()

    assert stats["leases"] == 0
    assert stats["pinned_pages"] == 0
    assert engine.scheduler.connector._hook_errors == 0
    assert engine.scheduler.kv_cache_manager.usage == 0
    engine.half.store.check()
