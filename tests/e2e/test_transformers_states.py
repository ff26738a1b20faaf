"""Recurrent and hybrid models: the same bits with the store as without, resumed from pages and a state.

Compared as in test_transformers_store.py, and over hundreds of decoded tokens: an error in a state feeds back.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectors.transformers.forward import Forward
from connectors.transformers.layout import model_layout
from kvstore.layout import Layout
from kvstore.page import split_key
from kvstore.testing.redis_server import LocalRedis
from kvstore.tiers.disk.tier import DiskTier
from tests.e2e.test_transformers_store import BLOCK, CHUNK, TIERS, assert_exact, cold_of, model_of, opened, settle
from tests.helpers.disk import record_of
from tests.helpers.tiny_models import STATEFUL, random_ids

SLOW = pytest.mark.slow
QUICK = [("falcon_h1", "float32"), ("qwen3_next", "bfloat16")]
MODELS = [
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else SLOW)
    for name in STATEFUL
    for dtype in ("float32", "bfloat16")
]
DECODED = 512


@pytest.mark.parametrize(("name", "dtype"), MODELS)
@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_that_alone_has_pages_and_state_gives_the_bits_of_a_cold_run(
    tier: str, name: str, dtype: str, tmp_path: Path
) -> None:
    model = model_of(name, dtype)
    ids = random_ids(150, seed=1)
    with ExitStack() as stack:
        disk = tmp_path if tier == "disk" else None
        url = stack.enter_context(LocalRedis()).url if tier == "redis" else None
        with opened(model, disk, url) as writer:
            writer.generate(ids, 4)
            settle(writer)
            if tier == "host":
                assert_exact(writer, ids, "host", 128)
        if tier != "host":
            with opened(model, disk, url) as reader:  # nothing in its host memory
                assert_exact(reader, ids, tier, 128)


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_hundreds_of_tokens_decoded_after_a_resume_have_the_logits_of_a_cold_run(
    name: str, dtype: str, tmp_path: Path
) -> None:
    model = model_of(name, dtype)
    ids = random_ids(150, seed=2)
    with opened(model, tmp_path) as writer:
        writer.prefill(ids)
    with opened(model, tmp_path) as reader:
        warm, cold = reader.prefill(ids), cold_of(model).prefill(ids)

        assert warm.report.by_tier == {"disk": 128}
        forward = Forward(model)
        token = int(cold.logits[0, -1].argmax())
        for step in range(DECODED):
            fed = np.array([token], dtype=np.uint32)
            expected = forward(fed, cold.cache, len(ids) + step)
            assert torch.equal(forward(fed, warm.cache, len(ids) + step), expected), f"token {step}"
            token = int(expected[0, -1].argmax()) if step % 7 else step % model.config.vocab_size  # no loop


@pytest.mark.parametrize(
    "name", ["falcon_h1", "mamba2", *(pytest.param(n, marks=SLOW) for n in ("lfm2", "qwen3_next"))]
)
def test_the_second_prompt_that_parts_from_a_stored_one_leaves_a_state_there_for_the_third(name: str) -> None:
    model = model_of(name)
    base = random_ids(200, seed=3)
    with opened(model) as kv:
        hits = []
        for seed in range(3):
            ids = base[:110] + random_ids(60, seed=10 + seed) if seed else base
            got = kv.prefill(ids, all_logits=True)
            settle(kv)
            hits.append(got.report.reused_tokens)
            expected = cold_of(model).prefill(ids, all_logits=True).logits
            assert torch.equal(got.logits, expected[:, got.report.reused_tokens :])
        stats = kv.connector._store.stats()  # type: ignore[union-attr]

    if name == "mamba2":  # it has no pages that would tell that the prompt was seen
        assert hits == [0, 0, 0]
    else:
        assert hits == [0, 0, 96]
        assert (stats["cut"]["no_state"], stats["stateless_tokens"]) == (1, 96)


@pytest.mark.parametrize("reuse", ["exact", "any"])
@pytest.mark.parametrize("name", ["falcon_h1", "mamba2"])
def test_a_prompt_of_whole_chunks_finds_itself_but_for_the_last_one(name: str, reuse: str) -> None:
    ids = random_ids(128, seed=7)
    with opened(model_of(name), reuse=reuse) as kv:
        kv.prefill(ids)
        settle(kv)

        again, longer = kv.prefill(ids), kv.prefill(ids + ids[:20])

        assert (again.report.reused_tokens, longer.report.reused_tokens) == (96, 128)


def test_with_any_reuse_the_next_turn_resumes_at_the_last_block_of_the_answer() -> None:
    model = model_of("falcon_h1")
    with opened(model, reuse="any") as kv:
        first = random_ids(90, seed=4)
        answer = kv.generate(first, 60, eos=())
        settle(kv)
        longer = first + answer.tokens + random_ids(20, seed=5)
        got = kv.prefill(longer, all_logits=True)

        unit = 32  # a block has 16 tokens, a chunk of the scan 32
        assert got.report.reused_tokens == (len(first) + 59) // unit * unit
        expected = cold_of(model).prefill(longer, all_logits=True).logits[:, got.report.reused_tokens :]
        torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
def test_a_damaged_state_is_a_counted_miss_and_the_prompt_is_computed(damage: str, tmp_path: Path) -> None:
    model = model_of("granitemoehybrid")
    ids = random_ids(150, seed=6)
    layout = model_layout(model, BLOCK)
    with opened(model, tmp_path) as writer:
        writer.generate(ids, 1)
    spoil_states(tmp_path, layout, damage)

    with opened_after_damage(model, tmp_path) as kv:
        answer = kv.generate(ids, 8)
        stats = kv.connector._store.stats()

    assert answer.report.reused_tokens == 0
    assert answer.tokens == cold_of(model).generate(ids, 8).tokens
    assert sum(stats["load_failures"].values()) >= 1
    assert sum(stats["corrupt_pages"].values()) >= 1


def opened_after_damage(model: Any, path: Path) -> Any:
    """`opened`, without its assertion that nothing failed."""
    from connectors.transformers import KVCacheModel
    from kvstore.config.sections import Config

    config = Config(
        store={"block_size": BLOCK, "load_or_recompute": False, "lookup_deadline_s": 10, "load_deadline_s": 30},
        host={"capacity_bytes": 4 << 20, "huge_pages": False},
        disk={"path": path, "capacity_bytes": 8 << 20},
    )
    return KVCacheModel.open(model, config, prefill_chunk=CHUNK)


def spoil_states(path: Path, layout: Layout, damage: str) -> None:
    """Flip a bit of, or zero the end of, every piece of a state in a closed store's slab file."""
    (directory,) = {file.parent.parent for file in path.rglob("data.mdb")}
    tier = DiskTier.open(directory, layout.fingerprint, layout.slot_bytes, 0, read_only=True)
    try:
        keys = [page.key for page in tier.scan() if split_key(page.key)[1] >= layout.block_groups]
        places = [(record_of(tier, key).slot * layout.slot_bytes, split_key(key)[1]) for key in keys]
        slab = tier._directory.slab.path
    finally:
        tier.close()
    assert places
    with open(slab, "r+b") as file:
        for start, group in places:
            at = start + layout.stored_bytes(group) // 2
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]) if damage == "flipped" else bytes(layout.stored_bytes(group) // 2))
