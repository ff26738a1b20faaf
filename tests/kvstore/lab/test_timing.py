"""Costs of prompts beside sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.lab.geometry import PRESETS, ModelGeometry
from kvstore.lab.hardware import UTILISATION, Gpu, Medium
from kvstore.lab.timing import PrefillModel, time_of

# 2 operations a token and 1 a position before it; 1 operation a second; 1 byte a token.
PLAIN = ModelGeometry("plain", 1.0, 1, 1, 1)
GPU = Gpu("slow", 1 / UTILISATION)
MODEL = PrefillModel(PLAIN, GPU, (Medium("near", 1.0, 0.0), Medium("far", 1.0, 100.0)))


def test_a_prefill_is_the_sum_over_its_positions() -> None:
    assert MODEL.prefill_s(0, 10) == pytest.approx(2 * 10 + 10 * 10 / 2)
    assert MODEL.prefill_s(4, 10) == pytest.approx(2 * 6 + (100 - 16) / 2)


def test_an_8b_model_takes_40_us_a_token_at_the_head_and_twice_that_at_30600() -> None:
    from kvstore.lab.hardware import GPUS

    model = PrefillModel(PRESETS["llama-3-8b"], GPUS["h100"], ())

    assert model.prefill_s(0, 1) == pytest.approx(40e-6, rel=0.01)
    assert model.prefill_s(30_600, 30_601) == pytest.approx(80e-6, rel=0.01)


def test_a_window_looks_back_no_further() -> None:
    windowed = ModelGeometry("windowed", 0.0, 0, 2, 1, windowed=1, window=4, window_bytes=2)

    assert windowed.prefill_flops(0, 10) == 4 * 4 / 2 + 4 * 6
    assert PrefillModel(windowed, GPU, (Medium("near", 1.0, 0.0),)).load_s(0, 10) == 8


def test_only_what_pays_is_loaded() -> None:
    whole = MODEL.prefill_s(0, 10)

    assert MODEL.serve_s(10, [4, 0]) == pytest.approx(4 + MODEL.prefill_s(4, 10))
    assert MODEL.serve_s(10, [0, 4]) == whole  # its latency alone is 100 s
    assert MODEL.serve_s(10, [4, 4]) == pytest.approx(4 + MODEL.prefill_s(4, 10))


def test_a_prompt_waits_for_the_one_before_it() -> None:
    hits = np.zeros((2, 1), np.int64)
    at_s, lengths = np.array([0.0, 10.0]), np.array([10, 10], np.int64)

    one, two = time_of(MODEL, at_s, lengths, hits), time_of(MODEL, at_s, lengths, hits, replicas=2)

    assert one.ttft_s.tolist() == pytest.approx([70.0, 130.0])
    assert two.ttft_s.tolist() == pytest.approx([70.0, 70.0])
    assert (one.saved, one.prefill_s, one.busy) == (0.0, pytest.approx(140.0), pytest.approx(14.0))
