"""The identity of a page's maker: everything that the bytes of a llama.cpp cache depend on beside the tokens.

What llama-server tells of itself is not enough: neither rope settings nor an overridden value of the model, a control
vector or flash attention are in any answer. So beside what it tells, the state that it makes of a fixed prompt is part
of the identity: its types, its rows and their very bits. They change with all of these, and with the processor's
instruction set: the pages of machines that compute unlike bits are kept apart, as they are for transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectors.llamacpp.slotfile import SlotFile, StateShape
from connectors.weights import files_digest
from kvstore.errors import ConfigError
from kvstore.layout import GroupKind, LayerGroup, Layout
from radix.namespace import Namespace

# Every server tokenizes it to some tokens; what they are is part of the witness.
WITNESS_PROMPT = "The quick brown fox jumps over the lazy dog: 0123456789, and so on, and so on.\n"


@dataclass(frozen=True, slots=True)
class StateMaker:
    """What makes states, as far as their bytes depend on it. The pages of equal ones are the same."""

    layout: Layout
    namespace: Namespace
    shape: StateShape


def state_maker(
    props: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    witness: SlotFile,
    *,
    block_size: int,
    weights: str,
    hash_name: str = "sha256",
) -> StateMaker:
    """Identify a server. Raises ConfigError if an adapter cannot be read.

    props:    its `GET /props`. adapters: its `GET /lora-adapters`.
    witness:  the state it has made of WITNESS_PROMPT.
    weights:  the identity of the GGUF file (`weights_name`).
    """
    layout = _layout(witness.shape, block_size)
    context = (props.get("default_generation_settings") or {}).get("n_ctx")
    extra = {
        "engine": f"llama.cpp {props.get('build_info', 'unknown')}",
        "context": str(context),
        "state": f"v{witness.shape.version}",
        "witness": witness_digest(witness),
    }
    namespace = Namespace(
        model="llama.cpp",
        revision=weights,
        dtype=layout.dtype,
        layout=layout.fingerprint,
        block_size=layout.block_size,
        adapter=adapters_name(adapters),
        hash=hash_name,
        extra=tuple(sorted(extra.items())),
    )
    return StateMaker(layout, namespace, witness.shape)


def weights_name(path: str | None, weights: str) -> str:
    """The identity of the GGUF file at `path`: sampled, in full, or the name the operator vouches for.

    Raises ConfigError if it cannot be read.
    """
    if weights not in ("sampled", "full"):
        return f"named {weights}"
    if path is None:
        raise ConfigError(
            "the server does not tell where its GGUF file is; name the file (--model) or it (--weights NAME)"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"the GGUF file {path!r} is not there, so its weights cannot be identified; give its place on this machine "
            "(--model FILE), or name them yourself (--weights NAME-AND-VERSION)"
        )
    return files_digest(file, full=weights == "full")


def adapters_name(adapters: Sequence[Mapping[str, Any]]) -> str:
    """The adapters in force with their scales; "" if there are none. Raises ConfigError if one cannot be read."""
    named = []
    for adapter in adapters:
        if not adapter.get("scale"):
            continue
        path = str(adapter.get("path", ""))
        if not Path(path).is_file():
            raise ConfigError(f"the adapter {path!r} cannot be read here, so its weights cannot be identified")
        named.append([files_digest(Path(path)), adapter["scale"]])
    return json.dumps(named) if named else ""


def witness_digest(witness: SlotFile) -> str:
    """32 hex digits over tokens and rows of a state, wherever its cells lie."""
    digest = hashlib.sha256(witness.tokens.tobytes())
    page = bytearray(witness.shape.token_bytes * len(witness.tokens))
    _fill(witness, page)
    digest.update(page)
    return digest.hexdigest()[:32]


def _layout(shape: StateShape, block_size: int) -> Layout:
    """The layout of pages cut out of files of `shape`."""
    layers = tuple(range(sum(cache.words[1] for cache in shape.caches)))
    group = LayerGroup(GroupKind.FULL, layers, shape.token_bytes * block_size)
    return Layout(block_size=block_size, groups=(group,), format=shape.format, dtype=shape.dtype)


def _fill(witness: SlotFile, page: bytearray) -> None:
    import numpy as np

    witness.copy_out(0, len(witness.tokens), np.frombuffer(page, np.uint8))
