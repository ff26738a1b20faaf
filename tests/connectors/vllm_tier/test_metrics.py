"""What the tier's counters become. No vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from connectors.vllm_tier.metrics import TierSamples, definitions
from tests.helpers.rows import ROW_BYTES
from tests.helpers.tier_world import KEYS, TierWorld, tier_worlds


@pytest.fixture
def world() -> Iterator[TierWorld]:
    yield from tier_worlds()


def test_every_counter_is_told_at_first_though_it_is_0(world: TierWorld) -> None:
    first = TierSamples(world.core).take()

    assert {sample.name for sample in first} == {metric.name for metric in definitions()}
    assert {sample.value for sample in first} == {0.0}


def test_samples_are_what_was_added_since_the_last_ones(world: TierWorld) -> None:
    samples = TierSamples(world.core)
    world.save(KEYS, [0, 1, 2, 3])

    first = {(sample.name, sample.labels): sample.value for sample in samples.take()}

    assert first["vllm:kvstore_tier_stored_chunks", ("disk",)] == 4
    assert first["vllm:kvstore_tier_stored_bytes", ("redis",)] == 4 * ROW_BYTES
    assert first["vllm:kvstore_tier_breaker_open", ("disk",)] == 0
    assert samples.take() == []
    world.save(KEYS[:1], [0])
    assert ("vllm:kvstore_tier_stored_chunks", 1) in {(one.name, one.value) for one in samples.take()}
    assert {name for name, _ in first} <= {metric.name for metric in definitions()}
