"""The identity of a page's maker: everything its bytes depend on beside what SGLang's page hashes already name.

SGLang's page hash covers the tokens, a request's `extra_key` and its `cache_salt`, and is the same for every model. So
the namespace names the weights by their files, the model's configuration, the element type and the layout of the pool,
the rank's share of the heads, and what decides the order of sums. An adapter is a part of `extra_key`: one that was
loaded by a request to the server by an id that nothing else has, one of `--lora-paths` by its name and path alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from connectors.weights import files_digest
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from radix.namespace import Namespace

# Arguments of the server that change what is computed of the same tokens by the same weights.
ARGUMENTS = (
    "attention_backend",
    "context_length",  # some ropes scale by it
    "decode_attention_backend",
    "dllm_algorithm",
    "dsa_decode_backend",
    "dsa_prefill_backend",
    "dsa_topk_backend",
    "dtype",
    "is_embedding",
    "json_model_override_args",
    "kt_method",
    "kt_num_gpu_experts",
    "kv_cache_dtype",
    "linear_attn_backend",
    "mamba_backend",
    "mamba_ssm_dtype",
    "model_impl",
    "model_loader_extra_config",
    "modelopt_quant",
    "moe_runner_backend",
    "prefill_attention_backend",
    "prefill_kv_cache_dequant_dtype",
    "quantization",
    "quantize_and_serve",
    "rl_on_policy_target",
)
# Those that name files: it is what the files hold that counts.
FILES = ("decrypted_config_file", "kt_weight_path", "quantization_param_path", "rl_quant_profile")
# Those of the model that drafts, and of what its own KV depends on.
DRAFT_ARGUMENTS = (
    "speculative_algorithm",
    "speculative_draft_attention_backend",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_model_quantization",
    "speculative_draft_window_size",
)
# Formats by which weights come from elsewhere than the files of the model.
FROM_ELSEWHERE = ("ipc_cache", "local_cached", "private", "rdma", "remote", "remote_instance")
_COSMETIC = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id"}


def page_namespace(
    server_args: Any,
    layout: Layout,
    rank: str,
    *,
    seat: str,
    where: str,
    weights: str,
    version: str,
    device: str,
    adapters_by_name: bool = False,
    has_draft: bool = False,
) -> Namespace:
    """The root of all page names of one rank.

    rank:   its share of the KV, "" where it has all of it. device: where it computes.
    has_draft: whether pages have KV of the model that drafts.
    seat:   which of SGLang's interfaces the pages come by. where: the argument that holds our settings.
    weights, adapters_by_name: the settings of these names.
    Raises ConfigError for what cannot be identified.
    """
    if getattr(server_args, "lora_paths", None) and not adapters_by_name:
        raise ConfigError(
            "--lora-paths is given, and SGLang names such an adapter by its name and path alone, so that other files "
            f'at the same path would share pages; set {where}={{"adapters_by_name": true}} if a path never '
            "changes its content, or load adapters by /load_lora_adapter, which gives each an id of its own"
        )
    model = str(server_args.model_path)
    cache = getattr(server_args, "download_dir", None)
    folder = find_model(model, getattr(server_args, "revision", None), cache)
    extra = {
        "arguments": arguments_digest(server_args),
        "config": config_digest(folder),
        "device": device,
        "engine": f"sglang {version}",
        "hash": "sglang sha256 page",
        "rank": rank,
        "seat": seat,
    }
    if has_draft:
        extra["draft"] = draft_name(server_args, weights, where)
    return Namespace(
        model=Path(model).name,
        revision=weights_name(server_args, folder, weights, where),
        dtype=layout.dtype,
        layout=layout.fingerprint,
        block_size=layout.block_size,
        extra=tuple(sorted(extra.items())),
    )


def arguments_digest(server_args: Any, names: tuple[str, ...] = ARGUMENTS) -> str:
    """32 hex digits of the arguments that change what is computed."""
    values = {name: str(getattr(server_args, name, None)) for name in names}
    for name in FILES:
        path = getattr(server_args, name, None)
        if path and Path(path).exists():
            values[name] = files_digest(Path(path))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def weights_name(server_args: Any, folder: Path | None, weights: str, where: str, model: str = "") -> str:
    """The identity of the weights: a digest of their files, or the name that the operator vouches for.

    model: the one that drafts; that of the server if there is none.
    """
    if weights not in ("sampled", "full"):
        return f"named {weights}"
    load_format = str(getattr(server_args, "load_format", "auto"))
    if model:
        load_format = str(getattr(server_args, "speculative_draft_load_format", None) or load_format)
    if load_format == "dummy":
        # Random weights, the same on each start of the same arguments.
        return f"dummy seed {getattr(server_args, 'random_seed', None)}"
    is_cached = str(getattr(server_args, "weight_cache_mode", "off")) != "off"
    if folder is None or is_cached or load_format in FROM_ELSEWHERE:
        how = "from a process that keeps them" if is_cached else f"load_format {load_format}"
        raise ConfigError(
            f"the weights of model {model or str(server_args.model_path)!r} are not those of files that can be read "
            f'here ({how}), so they cannot be identified; name them yourself: {where}={{"weights": "NAME-AND-VERSION"}}'
        )
    return files_digest(folder, full=weights == "full")


def draft_name(server_args: Any, weights: str, where: str) -> str:
    """The identity of the model that drafts, which may be a part of the model itself."""
    model = getattr(server_args, "speculative_draft_model_path", None)
    arguments = arguments_digest(server_args, DRAFT_ARGUMENTS)
    if not model:
        return arguments
    revision = getattr(server_args, "speculative_draft_model_revision", None)
    folder = find_model(str(model), revision, getattr(server_args, "download_dir", None))
    return " ".join([arguments, config_digest(folder), weights_name(server_args, folder, weights, where, str(model))])


def find_model(name: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """The directory (or the file) of a model, without asking the network; None if there is none.

    cache: where the hub's library has put it, if not in its usual place.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception:  # whatever the hub's library says: there are no files here
        return None


def config_digest(folder: Path | None) -> str:
    """32 hex digits of a model's configuration; "" where it has no file of its own (the head of a GGUF file has it)."""
    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return ""
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}); the model cannot be identified") from error
    kept = {key: value for key, value in values.items() if key not in _COSMETIC} if isinstance(values, dict) else values
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def device_name(device: Any) -> str:
    """What decides the order of sums: the kind of device that the pools lie on. device: torch's."""
    import torch

    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return str(torch.cuda.get_device_name(device))
