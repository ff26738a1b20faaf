from __future__ import annotations

from connectors.llamacpp.trust import PATIENCE, Effect, Trust


def test_a_restore_is_judged_by_what_was_computed() -> None:
    trust = Trust()

    assert trust.judge(128, 200, cache_n=128, prompt_n=72) is Effect.FULL
    assert trust.judge(128, 200, cache_n=60, prompt_n=140) is Effect.SHORT
    assert trust.judge(128, 200, cache_n=0, prompt_n=200) is Effect.NONE
    assert trust.judge(128, 200, cache_n=0, prompt_n=201) is Effect.UNKNOWN  # another prompt than the one looked up
    assert trust.effects == {"full": 1, "short": 1, "none": 1, "unknown": 1}


def test_trust_ends_after_restores_without_effect_in_a_row() -> None:
    trust = Trust()
    for _ in range(PATIENCE - 1):
        trust.judge(128, 200, 0, 200)
    trust.judge(128, 200, 128, 72)
    for _ in range(PATIENCE - 1):
        trust.judge(128, 200, 0, 200)
    assert trust.is_given

    trust.judge(128, 200, 0, 200)

    assert not trust.is_given
