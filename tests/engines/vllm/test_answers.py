"""The comparison that all tests of engines rest on finds one wrong page, be it another prompt's or the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.engines.vllm.answers import BOUND, difference
from tests.engines.vllm.conftest import Reference
from tests.engines.vllm.engine import BLOCK, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)
LENGTH = 1000
HIT = (LENGTH - 1) // BLOCK * BLOCK
PROMPT, OTHER = make_prompt(LENGTH, 1), make_prompt(LENGTH, 2)
Pages = dict[tuple[int, int], np.ndarray[Any, Any]]  # by layer group and block


def ask_with(engine: Engine, prompt: list[int], change: Callable[[Pages], None]) -> dict[str, Any]:
    """Ask for a stored prompt; its pages are changed in host memory as long as the request runs."""
    store, kept = engine.half.store, []
    prepare_load = store.prepare_load

    def prepare(*arguments: Any, **named: Any) -> Any:
        lease = prepare_load(*arguments, **named)
        pages = {(page.group, page.block): store.slots.array(page.slot) for page in lease.pages}
        kept.extend((page, page.copy()) for page in pages.values())
        change(pages)
        return lease

    engine.forget_own_cache()
    store.prepare_load = prepare
    try:
        return engine.ask(prompt)
    finally:
        store.prepare_load = prepare_load
        for page, content in kept:
            page[:] = content


class TestOneWrongPage:
    @pytest.fixture(
        scope="class", params=[("gqa", "float32"), ("sliding", "float32"), ("gqa", "bfloat16")], ids="-".join
    )
    def which(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        kind, dtype = request.param
        return kind, dtype

    @pytest.fixture(scope="class")
    def engine(self, open_engine: Callable[..., Engine], which: tuple[str, str]) -> Engine:
        engine = open_engine({"load": "async"}, kind=which[0], dtype=which[1])
        for prompt in (PROMPT, OTHER):
            engine.ask(prompt)
        return engine

    @pytest.fixture(scope="class")
    def foreign(self, engine: Engine) -> Pages:
        """The pages of another prompt."""
        pages: Pages = {}
        ask_with(engine, OTHER, lambda found: pages.update({key: page.copy() for key, page in found.items()}))
        return pages

    def test_the_right_pages_give_the_right_answer(
        self, engine: Engine, reference: Reference, which: tuple[str, str]
    ) -> None:
        answer = ask_with(engine, PROMPT, lambda pages: None)

        assert answer["cached"] == HIT
        reference.check([answer], [PROMPT], kind=which[0], dtype=which[1])

    # The last four blocks of this length are what a window of 128 tokens sees: there all layers are wrong.
    @pytest.mark.parametrize("block", [0, 7, 15, 28, 30])
    @pytest.mark.parametrize("fault", ["another prompt's page", "shifted by one block"])
    def test_a_wrong_one_is_found(
        self, engine: Engine, reference: Reference, which: tuple[str, str], foreign: Pages, block: int, fault: str
    ) -> None:
        def spoil(pages: Pages) -> None:
            for (group, number), page in pages.items():
                if number == block:
                    neighbour = pages.get((group, block - 1), pages.get((group, block + 1)))
                    wrong = foreign[group, block] if fault == "another prompt's page" else neighbour
                    assert wrong is not None
                    assert not np.array_equal(page, wrong)
                    page[:] = wrong

        answer = ask_with(engine, PROMPT, spoil)

        assert answer["cached"] == HIT
        with pytest.raises(AssertionError, match="differs by"):
            reference.check([answer], [PROMPT], kind=which[0], dtype=which[1])


def test_another_token_is_right_only_where_both_were_as_likely() -> None:
    right = {"tokens": [5, 6], "logprobs": [-1.0, -1.0], "likely": [{"5": -1.0, "7": -1.0005, "8": -2.0}, {"6": -1.0}]}

    assert difference({"tokens": [5, 6], "logprobs": [-1.0, -1.25]}, right) == 0.25
    assert difference({"tokens": [7, 9], "logprobs": [-1.0005, -9.0]}, right) < BOUND["float32"]
    assert difference({"tokens": [8, 6], "logprobs": [-2.0, -1.0]}, right) == 1.0
    assert difference({"tokens": [4, 6], "logprobs": [-1.0, -1.0]}, right) == float("inf")
    assert difference({"tokens": [5], "logprobs": [-1.0]}, right) == float("inf")
