"""bfloat16, in which sums show where a prompt was cut: loads answer as vLLM's own cache does at the same cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.vllm.conftest import MiB, Reference
from tests.engines.vllm.engine import BLOCK, Engine, make_prompt

pytestmark = pytest.mark.timeout(600)
CUTS = (1, 7, 12, 18)  # blocks


@pytest.mark.parametrize("kind", ["gqa", "sliding"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_an_answer_is_the_one_from_vllms_own_cache_at_the_same_cut(
    open_engine: Callable[..., Engine], reference: Reference, tmp_path: Path, kind: str, tier: str
) -> None:
    disk = {"path": str(tmp_path), "capacity_bytes": 32 * MiB}
    options = {"kind": kind, "dtype": "bfloat16"}
    engine = open_engine({"disk": disk, "load": "async"}, **options)
    heads = [make_prompt(cut * BLOCK, cut) for cut in CUTS]
    for head in heads:
        engine.ask([*head, *make_prompt(BLOCK, 50)], 1)  # of the length with which the reference fills vLLM's own cache
    if tier == "disk":
        engine = open_engine({"disk": disk}, **options)  # its host memory is empty
    engine.forget_own_cache()
    prompts = [[*head, *make_prompt(600 - len(head), 60)] for head in heads]

    answers = [engine.ask(prompt) for prompt in prompts]

    assert [answer["cached"] for answer in answers] == [len(head) for head in heads]
    reference.check(answers, prompts, kind=kind, dtype="bfloat16")
