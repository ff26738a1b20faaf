"""Several answers to one prompt, by `n` and by beams: one load of the prompt, one save of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engines.vllm.engine import BLOCK, Engine, make_prompt

PROMPT = make_prompt(1000, 71)
HIT = 999 // BLOCK * BLOCK
BLOCKS = 1000 // BLOCK


@pytest.fixture(scope="module")
def engine(open_engine: Callable[..., Engine]) -> Engine:
    return open_engine({"save": "prompt"})


def counted(engine: Engine) -> dict[str, float]:
    """What the connector has counted, once nothing is under way."""
    engine.settle()
    return dict(engine.half.counters)


def added(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    now = counted(engine)
    return {name: now[name] - before[name] for name in ("loaded_tokens", "saved_pages")}


def answers(engine: Engine, n: int) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    sampling = SamplingParams(n=n, temperature=1.0, seed=5, max_tokens=4, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return [tuple(one.token_ids) for one in output.outputs]


def beams(engine: Engine) -> list[tuple[int, ...]]:
    from vllm.sampling_params import BeamSearchParams

    (output,) = engine.llm.beam_search(
        [{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    )
    return [tuple(one.tokens[len(PROMPT) :]) for one in output.sequences]


@pytest.mark.parametrize("several", [lambda engine: answers(engine, 4), beams], ids=["n", "beams"])
def test_several_answers_save_their_prompt_once_and_load_it_once(
    engine: Engine, several: Callable[[Engine], list[tuple[int, ...]]]
) -> None:
    engine.forget_own_cache(reset_connector=True)
    before = counted(engine)
    cold = several(engine)
    saved = added(engine, before)
    engine.forget_own_cache()
    before = counted(engine)

    warm = several(engine)

    assert saved["saved_pages"] == BLOCKS
    assert saved["loaded_tokens"] == 0
    assert added(engine, before)["loaded_tokens"] == HIT
    assert added(engine, before)["saved_pages"] == 0
    assert len(set(cold)) > 1
    assert warm == cold
