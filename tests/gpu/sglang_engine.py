"""A real SGLang engine on a GPU with both of our seats; one JSON at the end. Needs SGLang 0.5.23, installed.

    python tests/gpu/sglang_engine.py --out sglang.json            # some minutes; a tiny random Llama, made here
    python tests/gpu/sglang_engine.py --model /models/... --tp 2   # a model of yours
    python tests/gpu/sglang_engine.py --dry-run                    # what would run, anywhere

Each seat has two lives of an engine, each in a process of its own, and four passes over the same prompts:

    compute     nothing is known: the first life computes
    own cache   SGLang's own cache (L1) has the prompts
    flushed     L1 was flushed: the pages come from the seat
    restarted   the second life: the pages come from the seat

What was loaded must give the same token ids as the pass `own cache`, which cut the prompt at the same place, and log
probabilities whose difference is 0. That the bytes matter is shown by a control: the same tail after another head.

Needs this clone on PYTHONPATH, with numpy, lmdb, msgspec and pydantic; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEATS = ("linker", "hicache")
PAGE = 64
NEW_TOKENS = 16
BUDGET_S = 540.0  # of the whole; a machine is lent for ten minutes
NEEDED = ("sglang", "torch", "numpy", "lmdb", "msgspec", "pydantic")
GiB = 1 << 30


def main(argv: list[str] | None = None) -> int:
    """Run, or print the plan. Returns 0 if every seat did what it promises."""
    args = parse(argv)
    if args.child is not None:
        return child(json.loads(Path(args.child).read_text()))
    with tempfile.TemporaryDirectory(prefix="kvstore-sglang-") as folder:
        plan = make_plan(args, Path(folder))
        if args.dry_run:
            print(json.dumps(plan, indent=2))
            return 0
        report = run(plan, Path(folder), args)
    text = json.dumps(report, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)
    return 0 if report["ok"] else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's directory; without it a tiny random Llama is made")
    parser.add_argument("--tp", type=int, default=1, help="ranks (tensor parallelism)")
    parser.add_argument("--seat", choices=(*SEATS, "both"), default="both")
    parser.add_argument("--prompts", type=int, default=4, help="prompts that share a head")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--out", help="file for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("tp", "prompts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; at least 1 is needed")
    if args.tokens < 4 * PAGE:
        parser.error(f"--tokens is {args.tokens}; at least {4 * PAGE} are needed, four pages")
    if args.budget_s <= 0:
        parser.error(f"--budget-s is {args.budget_s:g}; it must be positive")
    return args


def make_plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What runs, as plain values: for each seat SGLang's arguments, and the passes of each life."""
    seats = SEATS if args.seat == "both" else (args.seat,)
    return {
        "model": args.model or "a tiny random Llama",
        "prompts": args.prompts,
        "tokens": args.tokens,
        "budget_s": args.budget_s,
        "missing": [name for name in NEEDED if importlib.util.find_spec(name) is None],
        "daemon": ["-m", "kvstore", *daemon_arguments(folder, args.tp)] if "linker" in seats else None,
        "seats": {seat: engine_arguments(seat, args, folder) for seat in seats},
        "lives": [["compute", "own cache", "flushed"], ["restarted"]],
    }


def engine_arguments(seat: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The arguments of SGLang's engine for a seat."""
    common = {
        "model_path": args.model or str(folder / "model"),
        "tp_size": args.tp,
        "page_size": PAGE,
        "skip_tokenizer_init": True,
        "random_seed": 1,
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.5,
        "log_level": "warning",
    }
    if seat == "linker":
        return common | {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": "KVStoreLinker",
                "linker_module_path": "connectors.sglang_linker",
                "linker_extra_config": {"service": {"url": f"unix://{folder / 'kv.sock'}"}},
            },
        }
    ours = {"disk": {"path": str(folder / "pages"), "capacity_bytes": 8 * GiB}}
    named = {"backend_name": "kvstore", "module_path": "connectors.sglang", "class_name": "KVStoreBackend"}
    return common | {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 1.2,
        "hicache_mem_layout": "page_first",
        "hicache_write_policy": "write_through",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(
            {**named, "interface_v1": 1, "prefetch_threshold": PAGE, **ours}
        ),
    }


def daemon_arguments(folder: Path, ranks: int) -> list[str]:
    """The node daemon whose host memory outlives the linker's engines; a namespace for each rank."""
    settings = {
        "service.socket": folder / "kv.sock",
        "service.http_port": "none",
        "service.max_namespaces": ranks,
        "host.capacity_bytes": 4 * GiB,
    }
    return ["serve", *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]


# ---- the parent: lives one after the other -----------------------------------------------------------------------


def run(plan: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run all seats; what goes wrong with one is told, and the next one runs."""
    report: dict[str, Any] = {"plan": plan, "machine": machine(), "seats": {}, "ok": False}
    if plan["missing"]:
        report["error"] = f"not installed here: {', '.join(plan['missing'])}"
        return report
    until = time.monotonic() + plan["budget_s"]
    if not args.model:
        make_model(folder / "model")
    prompts = make_prompts(plan["prompts"], plan["tokens"])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    daemon = None
    if plan["daemon"]:
        daemon = subprocess.Popen([sys.executable, *plan["daemon"]], env=environment)
    try:
        for seat, arguments in plan["seats"].items():
            began = time.monotonic()
            try:
                passes = {}
                for number, life in enumerate(plan["lives"]):
                    job = {"engine": arguments, "passes": life, "prompts": prompts, "control": number == 0}
                    passes |= live(job, folder / f"{seat}-{number}.json", environment, until)
                report["seats"][seat] = judge(passes)
            except Exception as error:  # the other seat is worth trying
                report["seats"][seat] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            report["seats"][seat]["seconds"] = round(time.monotonic() - began, 1)
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait(30)
    report["ok"] = bool(report["seats"]) and all(found["ok"] for found in report["seats"].values())
    return report


def live(job: dict[str, Any], file: Path, environment: dict[str, str], until: float) -> dict[str, Any]:
    """One life of an engine, in a process of its own; returns what its passes gave."""
    result = file.with_suffix(".result")
    file.write_text(json.dumps({**job, "result": str(result)}))
    command = [sys.executable, __file__, "--child", str(file)]
    done = subprocess.run(command, env=environment, timeout=max(1.0, until - time.monotonic()), check=False)
    if not result.is_file():
        raise RuntimeError(f"an engine ended with code {done.returncode} and without a result")
    answers: dict[str, Any] = json.loads(result.read_text())
    return answers


def judge(passes: dict[str, Any]) -> dict[str, Any]:
    """Whether what was loaded is what SGLang's own cache gives."""
    reference, found = passes["own cache"], {}
    for name in ("flushed", "restarted"):
        got = passes[name]
        found[name] = {
            "same_ids": got["ids"] == reference["ids"],
            "logprob_difference": difference(got["logprobs"], reference["logprobs"]),
            "cached_tokens": got["cached"],
            "seconds": got["seconds"],
        }
    control = difference(passes["control"]["logprobs"][:1], reference["logprobs"][:1])
    ok = control > 0 and all(
        one["same_ids"] and one["logprob_difference"] == 0 and min(one["cached_tokens"]) >= PAGE
        for one in found.values()
    )
    computed = {"cached_tokens": passes["compute"]["cached"], "seconds": passes["compute"]["seconds"]}
    return {"ok": ok, **found, "compute": computed, "control_logprob_difference": control}


def difference(some: list[list[float]], others: list[list[float]]) -> float:
    """The greatest difference of two passes' log probabilities."""
    pairs = [pair for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)]
    return max((abs(a - b) for a, b in pairs), default=0.0)


# ---- a child: one life of an engine ------------------------------------------------------------------------------


def child(job: dict[str, Any]) -> int:
    """Serve the passes of one life and write what they gave."""
    import sglang

    engine = sglang.Engine(**job["engine"])
    answers: dict[str, Any] = {}
    try:
        for name in job["passes"]:
            if name == "flushed":
                wait_and_flush(engine)
            if name == "restarted" and job["engine"].get("enable_unified_cache_external_linker") is None:
                time.sleep(1.0)  # HiCache's own threads have just begun
            answers[name] = generate(engine, job["prompts"])
        if job["control"]:
            head, tail = job["prompts"][1][: 2 * PAGE], job["prompts"][0][2 * PAGE :]
            answers["control"] = generate(engine, [[token + 1 for token in head] + tail])
            wait_and_flush(engine)  # what was computed last has been handed over
    finally:
        engine.shutdown()
    Path(job["result"]).write_text(json.dumps(answers))
    return 0


def wait_and_flush(engine: Any) -> None:
    """Let SGLang hand over what it has inserted, then forget L1: refused as long as anything is under way."""
    for _ in range(50):
        time.sleep(0.2)
        answer = engine.flush_cache()
        if getattr(answer, "success", True):
            return
    raise RuntimeError(f"SGLang's cache could not be flushed: {answer}")


def generate(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Answer the prompts one after the other, so that each is cut where its pages end."""
    ids, logprobs, cached = [], [], []
    began = time.monotonic()
    for tokens in prompts:
        sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        answer = engine.generate(input_ids=tokens, sampling_params=sampling, return_logprob=True)
        meta = answer["meta_info"]
        ids.append(list(answer["output_ids"]))
        logprobs.append([float(entry[0]) for entry in meta["output_token_logprobs"]])
        cached.append(int(meta["cached_tokens"]))
    seconds = round(time.monotonic() - began, 3)
    return {"ids": ids, "logprobs": logprobs, "cached": cached, "seconds": seconds}


# ---- what it runs on ---------------------------------------------------------------------------------------------


def make_prompts(count: int, num_tokens: int) -> list[list[int]]:
    """Prompts of random tokens that share a quarter, and end in the middle of a page."""
    import random

    chance = random.Random(1)
    head = [chance.randrange(10, 31_000) for _ in range(num_tokens // 4)]
    num_own = num_tokens - len(head) - PAGE // 2
    return [head + [chance.randrange(10, 31_000) for _ in range(num_own)] for _ in range(max(2, count))]


def make_model(folder: Path) -> None:
    """A Llama of 8 layers with random weights, the same each time: large enough that every page matters."""
    import torch
    from safetensors.torch import save_file

    hidden, layers, heads, kv_heads, dim, inner, words = 512, 8, 8, 4, 64, 1024, 32_000
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": words,
        "max_position_embeddings": 16_384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, hidden),
        "lm_head.weight": (words, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * dim, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * dim, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    chance = torch.Generator().manual_seed(1)
    weights = {name: (torch.randn(shape, generator=chance) * 0.06).bfloat16() for name, shape in shapes.items()}
    norms = [
        f"model.layers.{n}.{which}_layernorm.weight" for n in range(layers) for which in ("input", "post_attention")
    ]
    weights |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in (*norms, "model.norm.weight")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def machine() -> dict[str, Any]:
    """What it ran on."""
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("torch", "sglang"):
        if importlib.util.find_spec(name) is not None:
            from importlib.metadata import version

            found[name] = version(name)
    if "torch" in found:
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


if __name__ == "__main__":
    sys.exit(main())
