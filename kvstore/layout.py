"""The layout of a page of one model on one engine: the bytes of one block, by layer group.

A `Layout` is a value made once, by a connector, from the engine's own cache; everything below it sees only sizes and
rules. Nothing here imports an engine.

A model is seldom one kind of layer, so a layout is a list of `LayerGroup`s, each with its own rule for what must be
present to resume a prompt after N tokens:

    full, mla        every block of [0, N)
    sliding window   only the blocks that hold tokens [N - (window - 1), N)
    recurrent        the state of these layers after exactly N tokens; it cannot be cut, and exists at chosen N only

One page holds one block of one group, with the pages of all local shards (tensor-parallel ranks) side by side, so a
slot is either whole or absent and "a block counts only when all ranks have it" needs no bookkeeping. All slots of a
slab have one size; `balanced_groups` therefore cuts the layers into groups of nearly equal bytes.

A state has a size of its own, from a tenth of a page to a hundred pages. It is cut, as one string of bytes, into pieces
of nearly equal size, each a group of kind recurrent (`groups_with_states`): a page of the last block before N. So a
piece has a slot, a key, a header and a checksum like any page, and no slab needs slots of a second size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import gcd

from kvstore.errors import ConfigError

SLOT_ALIGNMENT = 4096  # bytes; O_DIRECT wants the logical block size of the disk, 512 to 4096
MAX_PADDING = 0.12  # of the slots of a state
PIECE_ALIGNMENT = 64  # bytes; so that codecs see whole elements, whatever their type
PIECE_BYTES = 1 << 20  # of a state where there are no pages beside it; what disk and Redis move best


class GroupKind(Enum):
    """The resume rule of a layer group."""

    FULL = "full"
    MLA = "mla"
    SLIDING = "sliding"
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True)
class TensorAxes:
    """Where the elements of one layer's keys, or values, lie in a page of one shard.

    Element (head, token, dim) is two bytes of bfloat16 at offset + head * head_stride + token * token_stride + 2 * dim.
    """

    is_key: bool
    offset: int
    heads: int
    head_stride: int
    tokens: int
    token_stride: int
    dims: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share a rule and travel in one page.

    page_bytes: bytes of one block of these layers on one shard.
    window:     tokens a layer looks back on, itself included; only for SLIDING.
    axes:       what lies where in a page, if that is known; it covers the page. Nothing for bytes that are the
                engine's own affair: they are stored as they are. No part of the fingerprint: pages are the same.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    page_bytes: int
    window: int | None = None
    axes: tuple[TensorAxes, ...] = ()

    def __post_init__(self) -> None:
        if self.page_bytes <= 0:
            raise ConfigError(f"layer group: page_bytes is {self.page_bytes}; it must be positive")
        if (self.kind is GroupKind.SLIDING) != (self.window is not None):
            raise ConfigError(f"layer group: window is {self.window} for a {self.kind.value} group")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"layer group: window is {self.window} tokens; it must be at least 1")

    @property
    def is_state(self) -> bool:
        """True for a piece of a state, which few blocks have."""
        return self.kind is GroupKind.RECURRENT


@dataclass(frozen=True, slots=True)
class Layout:
    """The geometry of all pages of one namespace.

    block_size:   tokens per block.
    groups:       layer groups, in the order in which page keys number them; pieces of states come last.
    format:       name of the byte order inside a page, e.g. "transformers:layer,kv,head,token,dim"; part of the
                  fingerprint, since equal sizes do not mean equal meaning.
    dtype:        name of the element type, e.g. "bfloat16".
    shards:       ranks whose pages lie side by side in one slot.
    """

    block_size: int
    groups: tuple[LayerGroup, ...]
    format: str
    dtype: str
    shards: int = 1

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"layout: block_size is {self.block_size}; it must be at least 1 token")
        if not self.groups:
            raise ConfigError("layout: no layer group; a model needs at least one")
        if self.shards < 1:
            raise ConfigError(f"layout: shards is {self.shards}; it must be at least 1")
        kinds = [group.is_state for group in self.groups]
        if kinds != sorted(kinds):
            raise ConfigError(
                "layout: a group of kind recurrent stands before another kind; pieces of states come last"
            )

    @property
    def block_groups(self) -> int:
        """Groups of which every block has a page; those behind them are the pieces of a state."""
        return sum(not group.is_state for group in self.groups)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest group's pages of all shards, rounded up to SLOT_ALIGNMENT."""
        most = max(group.page_bytes for group in self.groups) * self.shards
        return -(-most // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all groups and shards, without padding and without a state."""
        return sum(group.page_bytes for group in self.groups[: self.block_groups]) * self.shards

    @property
    def state_bytes(self) -> int:
        """Bytes of one state over all its pieces and all shards, without padding; 0 where there is none."""
        return sum(group.page_bytes for group in self.groups[self.block_groups :]) * self.shards

    def stored_bytes(self, group: int) -> int:
        """Bytes of a slot that carry data for a page of `group`; the rest of the slot is padding."""
        return self.groups[group].page_bytes * self.shards

    def window_blocks(self, group: int) -> int | None:
        """Blocks of `group` that must be present before a resume point; None means all of them.

        A state is needed at the resume point itself: it is a page of the block that ends there, and a window of one.
        """
        if self.groups[group].is_state:
            return 1
        window = self.groups[group].window
        return None if window is None else -(-(window - 1) // self.block_size)

    @property
    def fingerprint(self) -> str:
        """32 hex digits that change with anything that changes the meaning of a page's bytes."""
        text = repr(
            (
                self.block_size,
                self.format,
                self.dtype,
                self.shards,
                [(g.kind.value, g.layers, g.page_bytes, g.window) for g in self.groups],
            )
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer: its rule and its bytes per token on one shard."""

    kind: GroupKind
    token_bytes: int
    window: int | None = None


def balanced_groups(layers: Sequence[LayerSpec | None], block_size: int) -> tuple[LayerGroup, ...]:
    """Cut layers into groups of nearly equal page size; None entries hold no KV and are skipped.

    Layers of one rule and one size form a class. When there are several classes, each is cut into groups of g layers, g
    being the greatest common divisor of the class sizes (Gemma 3 270M: 15 sliding and 3 full layers make 6 groups of
    3): the layers are equal there, so no slot has padding. A model of one class is one group.
    """
    classes = _classes(layers)
    if not classes:
        raise ConfigError("layout: the model has no layer that keeps keys and values")
    return _cut(classes, gcd(*(len(members) for members in classes.values())), block_size)


def groups_with_states(
    layers: Sequence[LayerSpec | None], block_size: int, state_layers: Sequence[int], state_bytes: int
) -> tuple[LayerGroup, ...]:
    """The groups of a model that also has a state: those of `balanced_groups`, or finer ones, then the state's pieces.

    state_bytes: of all layers together on one shard. None of `layers` may be one that keeps keys and values.

    The size of a slot decides how much of the last piece's slot is padding. So the attention layers are cut as coarsely
    as leaves at most MAX_PADDING of a state's slots empty, or as finely as layers allow (LFM2 1.2B: its state is an
    eighth of a block, so each attention layer has a page of its own).
    """
    classes = _classes(layers)
    if not classes:
        return _pieces(state_layers, state_bytes, min(state_bytes, PIECE_BYTES))
    most = gcd(*(len(members) for members in classes.values()))
    finer = [_cut(classes, step, block_size) for step in range(most, 0, -1) if most % step == 0]
    choices = [(groups, max(group.page_bytes for group in groups)) for groups in finer]
    padding = [1 - state_bytes / (-(-state_bytes // slot) * slot) for _, slot in choices]
    best = next((i for i, share in enumerate(padding) if share <= MAX_PADDING), padding.index(min(padding)))
    groups, slot = choices[best]
    return (*groups, *_pieces(state_layers, state_bytes, slot))


def _classes(layers: Sequence[LayerSpec | None]) -> dict[LayerSpec, list[int]]:
    classes: dict[LayerSpec, list[int]] = {}
    for index, spec in enumerate(layers):
        if spec is not None:
            classes.setdefault(spec, []).append(index)
    return classes


def _cut(classes: dict[LayerSpec, list[int]], step: int, block_size: int) -> tuple[LayerGroup, ...]:
    return tuple(
        LayerGroup(spec.kind, tuple(members[i : i + step]), spec.token_bytes * step * block_size, spec.window)
        for spec, members in classes.items()
        for i in range(0, len(members), step)
    )


def _pieces(layers: Sequence[int], state_bytes: int, slot: int) -> tuple[LayerGroup, ...]:
    """Cut a state into pieces of equal bytes, but for the last, each of whole PIECE_ALIGNMENTs."""
    most = max(1, slot // PIECE_ALIGNMENT)
    units = -(-state_bytes // PIECE_ALIGNMENT)
    size = -(-units // -(-units // most)) * PIECE_ALIGNMENT
    starts = range(0, state_bytes, size)
    return tuple(LayerGroup(GroupKind.RECURRENT, tuple(layers), min(size, state_bytes - start)) for start in starts)
