"""Which answer is right, and in which number format engines compute here.

Right is what vLLM itself answers, without us, when it takes as many tokens of the prompt out of its own cache. It is
not what vLLM answers when it computes the prompt in one piece: a sum that is cut at another place is rounded in
another place, and in bfloat16 one cut in three changes a token. Two answers are the same if their log probabilities
are equal within a bound, and their tokens too; only where vLLM itself has two tokens within the bound may either come.
What a wrong page does is far above the bound: test_answers.py puts wrong pages into engines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

# More than rounding does to a log probability, and far less than one wrong page does. Measured on an EPYC with AVX2
# only, in the tiny models: rounding 1e-5 between any two cuts in float32, 0.03 in bfloat16 and nothing at the same cut.
# One wrong page of 31: 0.1 to 4.
BOUND = {"float32": 1e-3, "bfloat16": 0.05}


def engine_dtype() -> str:
    """The number format of engines whose tests do not name one: bfloat16 where the processor computes in it.

    Elsewhere bfloat16 is emulated, ten times slower than float32. VLLM_TEST_DTYPE names another.
    """
    import torch

    named = os.environ.get("VLLM_TEST_DTYPE", "")
    if named:
        return named
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def difference(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """How far an answer is from the expected one: the largest difference of two log probabilities.

    answer: "tokens", and "logprobs" of each; expected: with "likely" too, the log probabilities of the likeliest
    tokens at each place. Where an answer has another token, it is judged by how much less likely that token was
    expected to be, and what follows is another text, which is not compared.
    """
    if len(answer["tokens"]) != len(expected["tokens"]):
        return float("inf")
    worst = 0.0
    steps = zip(answer["tokens"], answer["logprobs"], expected["tokens"], expected["logprobs"], strict=True)
    for place, (token, logprob, right, right_logprob) in enumerate(steps):
        if token != right:
            other = expected["likely"][place].get(str(token), float("-inf"))
            return max(worst, right_logprob - other, abs(logprob - other))
        worst = max(worst, abs(logprob - right_logprob))
    return worst


def assert_same(
    answers: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], dtype: str | None = None
) -> None:
    """Raise AssertionError unless every answer is the expected one, up to rounding."""
    bound = BOUND[dtype or engine_dtype()]
    for number, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        found = difference(answer, right)
        assert found <= bound, (
            f"answer {number} differs by {found:.3g}, more than {bound:g}: {answer['tokens']} is not {right['tokens']}"
        )
