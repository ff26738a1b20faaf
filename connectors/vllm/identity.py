"""The identity of a page's maker: everything its bytes depend on beside what vLLM's block hashes already name.

vLLM's block hashes cover the tokens, an adapter's name and path, multimodal content, prompt embeddings and
`cache_salt`. They say nothing about the model, the weights, the element type, the layout of a block or the machine; the
namespace does.

The weights are identified by their files, not by the name on the command line: two checkpoints at one path, or one name
on two machines, must not share pages. "sampled" reads every file's size, its head (for safetensors: names, shapes and
types of all tensors) and SAMPLES pieces spread over it, some milliseconds for a model of any size; training changes all
weights, so a changed model changes the samples. "full" reads every byte. An adapter is identified in the same way,
since two replicas may know different adapters by one name.

vLLM hands a secondary tier a summary of its configuration that is not enough to name the bytes (it lacks revision,
quantization, overrides, adapters, attention backend), and no way to ask for more. The full configuration is an argument
of the connector's constructor, which is running while tiers are made, so it is taken from there; where it cannot be
found, the tier refuses to start rather than guess.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from connectors.weights import files_digest
from kvstore.errors import ConfigError
from kvstore.layout import Layout
from radix.namespace import Namespace

# Say where a model was found or how it is to be printed, not what it computes.
_COSMETIC = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id"}


def engine_namespace(
    vllm_config: Any, layout: Layout, *, weights: str = "sampled", vllm_version: str, hash_name: str | None = None
) -> Namespace:
    """The root of all block hashes of this engine.

    weights: see ConnectorFields. Raises ConfigError if the weights cannot be identified.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    dtype = str(model.dtype).removeprefix("torch.")
    extra = {
        "config": config_digest(model),
        "engine": "vllm " + ".".join(vllm_version.split(".")[:2]),
        "hash": hash_name or str(getattr(cache, "prefix_caching_hash_algo", "sha256")),
        "kv_dtype": str(getattr(cache, "cache_dtype", "auto")),
        "kv_layout": str(getattr(cache, "kv_cache_layout", None)),
        "kernels": kernels_name(vllm_config, layout.block_size),
        "parallel": f"tp{vllm_config.parallel_config.tensor_parallel_size}",
        "quantization": str(getattr(model, "quantization", None)),
    }
    return Namespace(
        model=_model_type(model),
        revision=weights_name(vllm_config, weights),
        dtype=dtype,
        layout=layout.fingerprint,
        block_size=layout.block_size,
        extra=tuple(sorted(extra.items())),
    )


def chunk_namespace(
    vllm_config: Any, layout: Layout, *, weights: str, vllm_version: str, adapters_by_name: bool
) -> Namespace:
    """The root of all chunk names of this engine. Raises ConfigError for what cannot be told apart."""
    if getattr(vllm_config, "lora_config", None) is not None and not adapters_by_name:
        raise ConfigError(
            "KVStoreTier: LoRA is on, and vLLM names an adapter to a secondary tier by its name and path alone, so "
            'that other files at the same path would share pages; set "adapters_by_name": true if a path never changes '
            "its content, or use connectors.vllm.KVStoreConnector, which reads the adapters' files"
        )
    return engine_namespace(vllm_config, layout, weights=weights, vllm_version=vllm_version)


def find_engine_config(frame: FrameType | None = None) -> Any:
    """vLLM's full configuration, from whoever is making the tier. Raises ConfigError where it is nowhere."""
    for caller in _callers(frame or sys._getframe()):
        found = caller.f_locals.get("vllm_config")
        if type(found).__name__ == "VllmConfig":
            return found
    raise ConfigError(
        "KVStoreTier: vLLM's configuration was not found, so the model cannot be identified; the tier must be made by "
        "vLLM's OffloadingConnector (kv_connector='OffloadingConnector')"
    )


def weights_name(vllm_config: Any, weights: str) -> str:
    """The identity of the weights: a digest of their files, or the name the operator vouches for."""
    if weights not in ("sampled", "full"):
        return f"named {weights}"
    model = vllm_config.model_config
    load_format = str(getattr(getattr(vllm_config, "load_config", None), "load_format", "auto"))
    if load_format.endswith("dummy"):
        # vLLM makes the same random weights on every start of the same configuration.
        return f"dummy seed {getattr(model, 'seed', 0)}"
    folder = find_model(str(model.model), getattr(model, "revision", None))
    if folder is None:
        raise ConfigError(
            f"the files of model {str(model.model)!r} cannot be read here (load_format {load_format}), so its weights "
            'cannot be identified; name them yourself: kv_connector_extra_config={"weights": "NAME-AND-VERSION"}'
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


def adapter_name(lora_request: Any) -> str:
    """The identity of a LoRA adapter beside its name; "" for none. Raises ConfigError if its files cannot be read."""
    if lora_request is None:
        return ""
    folder = find_model(str(lora_request.lora_path))
    if folder is None:
        raise ConfigError(f"adapter {lora_request.lora_name!r}: {lora_request.lora_path!r} cannot be read")
    settings = folder / "adapter_config.json"
    config = hashlib.sha256(settings.read_bytes()).hexdigest()[:16] if settings.is_file() else ""
    return f"{files_digest(folder)}|{config}"


def config_digest(model: Any) -> str:
    """32 hex digits of the model's configuration as the engine runs it."""
    config = getattr(model, "hf_config", None)
    values = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    text = json.dumps(_plain(values), sort_keys=True, default=str)
    text += "|" + str(getattr(model, "hf_overrides", None) or "")
    if "rope" in text:
        # Some ropes scale by the longest prompt the engine was started for.
        text += f"|{getattr(model, 'max_model_len', '')}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def kernels_name(vllm_config: Any, block_size: int) -> str:
    """The settings that decide the order of bytes in a block, and of sums: instruction set or attention backend."""
    import torch

    device = str(getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu"))
    if device == "cuda":
        backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown"
        backend = getattr(backend, "name", backend) or os.environ.get("VLLM_ATTENTION_BACKEND", "auto")
        return f"cuda {name} {backend}"
    flags = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    known = [flag.removeprefix("_is_").removesuffix("_supported") for flag in flags if _has(torch.cpu, flag)]
    return " ".join([device, platform.machine(), torch.backends.cpu.get_cpu_capability(), *known])


def _has(module: Any, flag: str) -> bool:
    probe = getattr(module, flag, None)
    return bool(probe and probe())


def _model_type(model: Any) -> str:
    config = getattr(model, "hf_config", None)
    names = getattr(config, "architectures", None) or [type(config).__name__]
    return f"{getattr(config, 'model_type', '')}/{'+'.join(names)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in _COSMETIC}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
