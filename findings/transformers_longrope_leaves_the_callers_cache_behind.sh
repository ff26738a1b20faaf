#!/usr/bin/env bash
# transformers 5.23.0, Phi-3 with longrope: where generate() crosses the model's original length, it drops the cache that the
# caller gave it and goes on in a new one, silently. The caller's own cache object stays as it was at that length.
#
# The keys of a longrope model are turned by other factors on either side of `original_max_position_embeddings`, so the
# prompt is computed anew at the border: right for the answer. But whoever goes on with the cache that was passed in (the
# next turn of a conversation, a prefix cache that saves it) has one that ends in the middle of the answer, with keys of
# the short factors. Seen on 2026-11-30, torch 2.13.0 on a CPU, a tiny model with random weights:
#
#   transformers 5.23.0: a cache of 50 tokens, generate() adds 30, the border is at 64
#   the answer has 80 tokens; the caller's cache has 64
#   the same below the border (50 + 10): the caller's cache has 59
#
# (59, as the last token's keys are never computed.) Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM

transformers.logging.set_verbosity_error()
BORDER, HEAD = 64, 16
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    max_position_embeddings=256, original_max_position_embeddings=BORDER,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER,
        "short_factor": [1.0] * (HEAD // 2), "long_factor": [4.0] * (HEAD // 2),
    },
)
model = Phi3ForCausalLM(config).eval()
prompt = torch.randint(2, 128, (1, 50))


def answer(num_tokens):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        found = model.generate(
            prompt, past_key_values=cache, max_new_tokens=num_tokens, do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
    return found.shape[1], int(cache.get_seq_length())


print(f"transformers {transformers.__version__}: a cache of 50 tokens, generate() adds 30, the border is at {BORDER}")
length, cached = answer(30)
print(f"the answer has {length} tokens; the caller's cache has {cached}")
assert (length, cached) == (80, BORDER)
length, cached = answer(10)
print(f"the same below the border (50 + 10): the caller's cache has {cached}")
assert (length, cached) == (60, 59)
PY
