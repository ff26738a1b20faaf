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
    "dtype",
    "json_model_override_args",
    "kv_cache_dtype",
    "prefill_attention_backend",
    "quantization",
    "quantization_param_path",
    "rope_scaling",
)
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
) -> Namespace:
    """The root of all page names of one rank.

    rank:   its share of the KV, "" where it has all of it. device: where it computes.
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
    folder = find_model(model, getattr(server_args, "revision", None))
    arguments = {name: str(getattr(server_args, name, None)) for name in ARGUMENTS}
    extra = {
        "arguments": hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:32],
        "config": config_digest(folder),
        "device": device,
        "engine": f"sglang {version}",
        "hash": "sglang sha256 page",
        "rank": rank,
        "seat": seat,
    }
    return Namespace(
        model=Path(model).name,
        revision=weights_name(server_args, folder, weights, where),
        dtype=layout.dtype,
        layout=layout.fingerprint,
        block_size=layout.block_size,
        extra=tuple(sorted(extra.items())),
    )


def weights_name(server_args: Any, folder: Path | None, weights: str, where: str) -> str:
    """The identity of the weights: a digest of their files, or the name that the operator vouches for."""
    if weights not in ("sampled", "full"):
        return f"named {weights}"
    load_format = str(getattr(server_args, "load_format", "auto"))
    if load_format == "dummy":
        # Random weights, the same on each start of the same arguments.
        return f"dummy seed {getattr(server_args, 'random_seed', None)}"
    if folder is None:
        raise ConfigError(
            f"the files of model {server_args.model_path!r} cannot be read here (load_format {load_format}), so its "
            f'weights cannot be identified; name them yourself: {where}={{"weights": "NAME-AND-VERSION"}}'
        )
    return files_digest(folder, full=weights == "full")


def find_model(name: str, revision: str | None = None) -> Path | None:
    """The directory (or the file) of a model, without asking the network; None if there is none."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, local_files_only=True))
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
