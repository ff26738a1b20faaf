"""The identity of a page's maker: everything that its bytes depend on beside the tokens, as one namespace.

Two processes share pages only if every field here is equal. What a user may forget to say is measured instead: the
weights are hashed, the attention implementation and the adapters in force are read from the model.

KV bytes also depend on *how* they were computed: the number of threads, the instruction set and the version of a
kernel decide the order of sums. A store of mode "exact" promises the bits of a cold run, so those are part of its
namespace; a store of mode "any" promises equality up to rounding and shares more widely.

The hard thing: a model can change under a running connector, and some of what it computes cannot be written down at
all. Both are the matter of `ModelWatch` (watch.py); here is what can be.
"""

from __future__ import annotations

import hashlib
import json
import platform
from enum import Enum
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

import xxhash

from connectors.transformers.layout import model_device
from connectors.transformers.parts import acting_adapters, structure_digest, tuners_of
from connectors.transformers.positions import steady_tokens
from connectors.transformers.process import order_of_sums, precision
from connectors.transformers.states import scan_chunk
from connectors.transformers.watch import attention_name
from kvstore.errors import ConfigError
from kvstore.layout import Layout

if TYPE_CHECKING:
    import torch

    from kvstore.base import KVStore
    from radix.namespace import Namespace

# Say where a model was found or how it is to be printed, not what it computes.
_COSMETIC = {
    "_name_or_path",
    "architectures",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}


class Reuse(str, Enum):
    """The promise of a hit.

    EXACT: the bits of a cold run with the same prefill chunks; hits end on chunk boundaries.
    ANY:   equal up to rounding; hits end on any block boundary, and blocks written while decoding count too.
    """

    EXACT = "exact"
    ANY = "any"


def check_reuse(reuse: Reuse | str) -> Reuse:
    """Parse a mode. Raises ConfigError for one that does not exist."""
    try:
        return Reuse(reuse)
    except ValueError:
        raise ConfigError(f"reuse is {reuse!r}; it must be one of {', '.join(mode.value for mode in Reuse)}") from None


def check_chunk(prefill_chunk: int, block_size: int) -> None:
    """Raise ConfigError unless `prefill_chunk` is a positive multiple of `block_size`."""
    if prefill_chunk < 1 or prefill_chunk % block_size:
        right = max(1, round(prefill_chunk / block_size)) * block_size
        raise ConfigError(
            f"prefill_chunk is {prefill_chunk}; it must be a multiple of the block size {block_size}, e.g. {right}"
        )


def model_namespace(
    model: Any,
    layout: Layout,
    *,
    prefill_chunk: int = 256,
    reuse: Reuse | str = Reuse.EXACT,
    salt: str = "",
    revision: str | None = None,
    hash_name: str = "sha256",
) -> Namespace:
    """The root of all block hashes of `model`, as it is now.

    revision:  identity of the weights where the caller vouches for it (a commit of the hub, say); None hashes all
               parameters and buffers, which takes a second for every 5 GB or so.
    salt:      keeps apart what is equal otherwise; tenants of one store are kept apart by `RequestOptions.tenant`.
    """
    from radix.namespace import Namespace

    reuse = check_reuse(reuse)
    extra = {
        "attention": attention_name(model),
        "config": config_digest(model.config),
        "engine": f"transformers {_major(_version('transformers'))}",
        "isa": _instruction_set(model_device(model)),
        "modules": structure_digest(model),
        "prefill": f"{reuse.value}:{prefill_chunk}" if reuse is Reuse.EXACT else reuse.value,
    }
    if layout.state_bytes:
        # What a state means is the business of kernels and of the library's own code, which changes between two fixes.
        extra["engine"] = f"transformers {_version('transformers')}"
        extra["scan"] = f"{scan_chunk(model.config)}:{_kernels()}"
    if reuse is Reuse.EXACT:
        extra["numerics"] = order_of_sums()
    elif unusual := precision():
        extra["precision"] = unusual
    return Namespace(
        model=f"{getattr(model.config, 'model_type', '')}/{_plain_class(model).__name__}",
        revision=revision if revision is not None else weights_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        layout=layout.fingerprint,
        block_size=layout.block_size,
        adapter=active_adapters(model),
        salt=salt,
        hash=hash_name,
        extra=tuple(sorted(extra.items())),
    )


def check_namespace(model: Any, store: KVStore, *, prefill_chunk: int, reuse: Reuse) -> None:
    """Refuse a store of another model or mode, where it tells its namespace. The weights are not hashed again.

    Raises ConfigError.
    """
    theirs = getattr(store, "namespace", None)
    if theirs is None:
        return
    ours = model_namespace(
        model,
        store.layout,
        prefill_chunk=prefill_chunk,
        reuse=reuse,
        salt=theirs.salt,
        revision=theirs.revision,
        hash_name=theirs.hash,
    )
    names = ("model", "dtype", "layout", "block_size", "adapter")
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    pairs += [(name, value, dict(theirs.extra).get(name)) for name, value in ours.extra]
    wrong = [f"{name} is {there!r}, here {here!r}" for name, here, there in pairs if here != there]
    if wrong:
        raise ConfigError("the store was opened for another model or mode: " + "; ".join(wrong))


def weights_fingerprint(model: Any) -> str:
    """xxh3_128 over name, type, shape and bytes of every parameter and buffer, in the order of their names.

    Not a cryptographic hash: it tells models apart, it does not defend against one made to collide.
    """
    digest = xxhash.xxh3_128()
    moving = steady_tokens(model.config) is not None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors):
        tensor = tensors[name]
        # These two ropes rewrite inv_freq as they go: what it holds now tells of the last prompt, not of the model.
        if moving and name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_tensor_bytes(name, tensor))
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """32 hex digits of everything in a model's config but its cosmetic fields."""
    text = json.dumps(_without_cosmetics(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def active_adapters(model: Any) -> str:
    """Names of the PEFT adapters in force, and a digest of where and how strongly they act; "" if there are none."""
    return acting_adapters(tuners_of(model))


def _without_cosmetics(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_cosmetics(v) for k, v in value.items() if k not in _COSMETIC}
    return [_without_cosmetics(item) for item in value] if isinstance(value, list) else value


def _tensor_bytes(name: str, tensor: torch.Tensor) -> memoryview:
    import torch

    try:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model: the bytes of {name!r} cannot be read ({error}); name the weights by revision="
        ) from error


def _plain_class(model: Any) -> type:
    """The class of the model itself, also where PEFT has wrapped it."""
    get_base = getattr(model, "get_base_model", None)
    return type(get_base() if get_base is not None else model)


def _instruction_set(device: torch.device) -> str:
    """The family of the hardware: kernels are chosen by it."""
    import torch

    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    known = [flag.split("_is_")[1].removesuffix("_supported") for flag in flags if getattr(torch.cpu, flag, bool)()]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *known])


def _kernels() -> str:
    """The packages whose kernels transformers takes for states where they are installed, with their versions."""
    packages = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "kernels")
    installed = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in distributions()}
    return ", ".join(f"{name} {installed[name]}" for name in packages if name in installed) or "torch"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _major(version: str) -> str:
    return version.split(".")[0]
