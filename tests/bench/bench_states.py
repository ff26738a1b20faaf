"""Conversations of short turns with a hybrid model: which share of what could be reused is reused.

    python -m tests.bench.bench_states [MODEL ...]        # names of tests/helpers/tiny_models.py:STATEFUL

Each of two users has ten turns of 60 to 300 tokens, answers included. What could be reused of a prompt: the one before
it and, where answers are saved (reuse "any"), the answer. Counts only: no clock, so any machine says the same.
"""

from __future__ import annotations

import random
import sys

import torch

from connectors.transformers import KVCacheModel
from connectors.transformers.layout import model_layout
from kvstore.config.sections import Config
from tests.helpers.tiny_models import random_ids, tiny_model
from tests.helpers.waiting import WAIT_S

BLOCK, USERS, TURNS, MAX_PROMPT = 16, 2, 10, 1900
MODES = [("exact", 64), ("exact", 256), ("any", 256)]


def converse(name: str, reuse: str, chunk: int) -> tuple[int, int, int]:
    """Tokens that were reused, that could have been, and of all prompts."""
    model, chance = tiny_model(name), random.Random(3)
    layout = model_layout(model, BLOCK)
    config = Config(
        store={"block_size": BLOCK, "load_or_recompute": False},
        host={"capacity_bytes": 3000 * layout.slot_bytes, "huge_pages": False},
    )
    reused = possible = prompts = 0
    with KVCacheModel.open(model, config, prefill_chunk=chunk, reuse=reuse) as kv:
        for user in range(USERS):
            ids, known = random_ids(chance.randint(60, 300), seed=user), 0
            for turn in range(TURNS):
                num_new = chance.randint(20, 60)
                answer = kv.generate(ids, num_new, eos=())
                assert kv.flush(WAIT_S)
                reused, possible = reused + answer.report.reused_tokens, possible + known
                prompts += len(ids)
                known = len(ids) + (num_new - 1 if reuse == "any" else 0)
                ids = ids + answer.tokens + random_ids(chance.randint(40, 240), seed=100 * user + turn)
                if len(ids) > MAX_PROMPT:
                    break
    return reused, possible, prompts


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ["lfm2", "falcon_h1", "qwen3_next"]:
        for reuse, chunk in MODES:
            reused, possible, prompts = converse(name, reuse, chunk)
            share = f"{reused} of {possible} tokens reused, {reused / possible:.3f}"
            print(f"{name}, reuse {reuse}, prefill chunk {chunk}: {share} ({prompts} in all prompts)", flush=True)


if __name__ == "__main__":
    main()
