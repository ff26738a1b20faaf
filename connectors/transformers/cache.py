"""Pages in and out of a transformers `DynamicCache`.

In: `CacheBridge.load` builds a fresh cache that believes it has seen N tokens. Each layer's tensors are allocated
once and filled straight from the slots, one device call per layer group.

Out: a `Recorder` rides along with one request's forwards and yields `Span`s, references to tensors that hold the new
tokens of one group; `CacheBridge.copy_out` gathers their blocks into slots, later and on another thread. Holding a
reference is enough, because a `DynamicLayer` grows by making a new tensor and never writes into the old one.

The hard thing: a sliding layer keeps only its window, so interior blocks must be taken while they pass. The layers
are told to record their past before a forward, the new blocks are cloned after it, and `crop(0)` puts the layer back
to exactly what it would have held without us: the same values, and the same inputs to the next forward.

A state is another matter: a model writes into it in place, and what it was cannot be had afterwards. So a `Snapshot` is
a copy, taken between two forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from connectors.transformers.layout import CacheShapes, StateTensor, is_sliding, model_device, new_cache
from kvstore.base import SlotPages
from kvstore.devices.base import Device
from kvstore.devices.tables import token_table
from kvstore.layout import Layout

if TYPE_CHECKING:
    import torch

SlotArray = Callable[[int], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Span:
    """Tensors that hold whole blocks [first_block, last_block) of one layer group.

    tensors: keys and values of each layer in turn, [1, heads, tokens, dim]; token 0 of each is token
             first_block * block_size of the prompt.
    """

    group: int
    first_block: int
    last_block: int
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a model's state after `num_blocks` whole blocks. data: uint8, shape (state bytes,), on its device."""

    num_blocks: int
    data: torch.Tensor


class CacheBridge:
    """Knows how the layers of one model lie in its pages. Any thread; holds no cache."""

    def __init__(self, model: Any, shapes: CacheShapes, layout: Layout, device: Device) -> None:
        self._model = model
        self._shapes = shapes
        self._layout = layout
        self._device = device
        self._torch_device = model_device(model)

    @property
    def has_states(self) -> bool:
        """True if some layers keep a state instead of rows."""
        return bool(self._shapes.states)

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """The tensors of a state."""
        return self._shapes.states

    @property
    def can_be_cut(self) -> bool:
        """True if what resumes a prompt after N blocks also resumes it after fewer: no windows, and no states."""
        return not self.has_states and all(group.window is None for group in self._layout.groups)

    def new_cache(self) -> Any:
        """A fresh, empty cache of the model."""
        return new_cache(self._model)

    def load(self, pages: SlotPages, num_blocks: int, slot_array: SlotArray) -> Any:
        """Make a cache that holds blocks [0, num_blocks), copied from the slots of a ready lease.

        Returns once the slots may be released. Raises LookupError, before anything is copied, if a block that some
        group needs is not among `pages`: tensors are not cleared, so a missing page would be garbage.
        """
        import torch

        cache = self.new_cache()
        plans = []
        for group in range(self._layout.block_groups):
            first = self._first_needed(group, num_blocks)
            wanted = pages.at(_indexes_of(pages, group, first, num_blocks))
            wanted = wanted.at(np.argsort(wanted.blocks))
            have = wanted.blocks.tolist()
            if have != list(range(first, num_blocks)):
                raise LookupError(f"load: group {group} needs blocks [{first}, {num_blocks}), the lease has {have}")
            plans.append((group, first, wanted.slots.tolist()))
        pieces = self._pieces(pages, num_blocks)
        events = []
        with torch.inference_mode():
            for group, first, slots in plans:
                tensors = self._allocate(group, (num_blocks - first) * self._layout.block_size)
                table = token_table([tensor[0] for tensor in tensors], self._layout.block_size)
                events.append(self._device.copy_in(table, range(len(slots)), [slot_array(slot) for slot in slots]))
                self._install(cache, group, tensors, num_blocks * self._layout.block_size)
            if pieces:
                self._put_state(cache, torch.cat([torch.from_numpy(slot_array(slot)[:size]) for slot, size in pieces]))
        for event in events:
            event.wait()
        return cache

    def snapshot(self, cache: Any, num_blocks: int) -> Snapshot:
        """Copy the state that the model's layers are in after `num_blocks` blocks."""
        import torch

        data = torch.zeros(self._shapes.state_bytes, dtype=torch.uint8, device=self._torch_device)
        with torch.inference_mode():
            for tensor in self._shapes.states:
                state = getattr(cache.layers[tensor.layer], tensor.name)[tensor.index]
                if state is None or tuple(state.shape) != tensor.shape or state.dtype != tensor.dtype:
                    raise LookupError(f"save: layer {tensor.layer} has no {tensor.name} of {tensor.shape}")
                data[tensor.start : tensor.stop] = state.contiguous().reshape(-1).view(torch.uint8)
        return Snapshot(num_blocks, data)

    def copy_out(
        self, spans: Sequence[Span], pages: SlotPages, slot_array: SlotArray, states: Sequence[Snapshot] = ()
    ) -> list[bool]:
        """Gather the pages of a save lease; say which of them were found there and are whole now."""
        filled = [False] * len(pages)
        for state in states:
            self._copy_state(state, pages, slot_array, filled)
        events = []
        for span in spans:
            indexes = _indexes_of(pages, span.group, span.first_block, span.last_block)
            wanted = pages.at(indexes)
            if not wanted:
                continue
            table = token_table([_rows(tensor) for tensor in span.tensors], self._layout.block_size)
            ids = (wanted.blocks - span.first_block).tolist()
            events.append(self._device.copy_out(table, ids, [slot_array(slot) for slot in wanted.slots.tolist()]))
            for index in indexes.tolist():
                filled[index] = True
        for event in events:
            event.wait()
        return filled

    def full_spans(self, cache: Any, first_block: int, last_block: int) -> list[Span]:
        """References to what the layers without a window hold now, for blocks [first_block, last_block)."""
        spans = []
        for index, group in enumerate(self._layout.groups):
            if group.window is None and not group.is_state and first_block < last_block:
                tokens = slice(first_block * self._layout.block_size, last_block * self._layout.block_size)
                tensors = [
                    tensor[:, :, tokens]
                    for layer in group.layers
                    for tensor in (cache.layers[layer].keys, cache.layers[layer].values)
                ]
                if any(tensor.shape[2] != tokens.stop - tokens.start for tensor in tensors):
                    raise LookupError(f"save: the cache does not hold tokens [{tokens.start}, {tokens.stop})")
                spans.append(Span(index, first_block, last_block, tuple(tensors)))
        return spans

    def computed(self) -> Callable[[], None]:
        """A call that returns, on any thread, when all that this thread has given the model's device so far is done.

        A forward on a GPU returns before it is computed, and the worker that saves is on no stream of the engine's.
        """
        if self._torch_device.type != "cuda":
            return _nothing
        import torch

        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._torch_device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def recorder(self, cache: Any, num_tokens: int) -> Recorder:
        """A recorder for a cache that holds `num_tokens` tokens, a whole number of blocks."""
        return Recorder(self, self._layout, cache, num_tokens)

    def _first_needed(self, group: int, num_blocks: int) -> int:
        window = self._layout.window_blocks(group)
        return 0 if window is None else max(0, num_blocks - window)

    def _allocate(self, group: int, num_tokens: int) -> list[torch.Tensor]:
        import torch

        tensors = []
        for layer in self._layout.groups[group].layers:
            shape = self._shapes.layers[layer]
            assert shape is not None  # groups are made of layers that have a shape
            for heads, dim, dtype in zip(shape.heads, shape.dims, shape.dtypes, strict=True):
                tensors.append(torch.empty((1, heads, num_tokens, dim), dtype=dtype, device=self._torch_device))
        return tensors

    def _install(self, cache: Any, group: int, tensors: Sequence[torch.Tensor], num_tokens: int) -> None:
        """Make the group's layers believe they have seen `num_tokens` tokens."""
        window = self._layout.groups[group].window
        for place, index in enumerate(self._layout.groups[group].layers):
            keys, values = tensors[2 * place : 2 * place + 2]
            layer = cache.layers[index]
            layer.lazy_initialization(keys, values)
            if window is None:
                layer.keys, layer.values = keys, values
            else:
                layer.keys, layer.values = keys[:, :, 1 - window :], values[:, :, 1 - window :]
                layer.cumulative_length = num_tokens

    def _pieces(self, pages: SlotPages, num_blocks: int) -> list[tuple[int, int]]:
        """Slot and bytes of each piece of the state after `num_blocks` blocks, in order."""
        layout, slots = self._layout, []
        for group in range(layout.block_groups, len(layout.groups)):
            at = _indexes_of(pages, group, num_blocks - 1, num_blocks)
            if len(at) != 1:
                raise LookupError(f"load: the lease has no piece {group} of the state after {num_blocks} blocks")
            slots.append((int(pages.slots[at[0]]), layout.groups[group].page_bytes))
        return slots

    def _put_state(self, cache: Any, data: torch.Tensor) -> None:
        """Bring the layers into a state. They copy it: `data` is of no use to them afterwards."""
        for tensor in self._shapes.states:
            layer = cache.layers[tensor.layer]
            state = data[tensor.start : tensor.stop].view(tensor.dtype).reshape(tensor.shape).to(self._torch_device)
            if tensor.name == "conv_states":
                layer.update_conv_state(state, state_idx=tensor.index)
            else:
                layer.update_recurrent_state(state, state_idx=tensor.index)
            layer.has_previous_state[tensor.index] = True

    def _copy_state(self, state: Snapshot, pages: SlotPages, slot_array: SlotArray, filled: list[bool]) -> None:
        import torch

        start = 0
        for group in range(self._layout.block_groups, len(self._layout.groups)):
            size = self._layout.groups[group].page_bytes
            for index in _indexes_of(pages, group, state.num_blocks - 1, state.num_blocks).tolist():
                torch.from_numpy(slot_array(int(pages.slots[index]))[:size]).copy_(state.data[start : start + size])
                filled[index] = True
            start += size


class Recorder:
    """Keeps the blocks that pass through one cache, until they are taken as spans. The request's thread only.

    For each forward: `before()`, the forward, `after(num_tokens)`; in the end `finish(num_tokens)`. Where the model has
    no sliding layers all of these do nothing, since the cache itself holds every token. Raises LookupError, instead of
    handing out wrong tokens, if the cache was changed by someone else in between.
    """

    def __init__(self, bridge: CacheBridge, layout: Layout, cache: Any, num_tokens: int) -> None:
        self._bridge = bridge
        self._layout = layout
        self._cache = cache
        self._sliding = [index for index, group in enumerate(layout.groups) if group.window is not None]
        self._passed: list[Span] = []
        self._states: list[Snapshot] = []
        self._seen = num_tokens // layout.block_size  # blocks taken, or there before us
        self._taken = self._seen

    def before(self) -> None:
        """Make sliding layers keep what the next forward pushes out of their windows."""
        for layer in self._layers():
            layer.activate_past_recording()

    def after(self, num_tokens: int) -> None:
        """Keep the blocks that became whole; the cache holds `num_tokens` now.

        In the middle of a block the layers are not cropped: what they hold of it is needed when it is whole.
        """
        if self._sliding:
            self._keep(num_tokens)
            if num_tokens % self._layout.block_size == 0:
                self._crop()

    def finish(self, num_tokens: int) -> None:
        """Keep what is whole and give the layers back as they would be without us."""
        if self._sliding:
            self._keep(num_tokens)
            self._crop()
            for layer in self._layers():
                layer.record_past = False

    def take(self, num_tokens: int) -> list[Span]:
        """The whole blocks among `num_tokens` tokens that were not taken before, as spans of all groups."""
        last = num_tokens // self._layout.block_size
        spans = [*self._passed, *self._bridge.full_spans(self._cache, self._taken, last)]
        self._passed, self._taken = [], max(last, self._taken)
        return spans

    def keep_state(self, num_tokens: int, *, instead: bool = False) -> None:
        """Copy the state after `num_tokens` tokens, whole blocks. instead: of the one that was kept last."""
        if instead and self._states:
            self._states.pop()
        self._states.append(self._bridge.snapshot(self._cache, num_tokens // self._layout.block_size))

    def take_states(self) -> list[Snapshot]:
        """The states that were kept since they were taken last."""
        states, self._states = self._states, []
        return states

    def _layers(self) -> list[Any]:
        if not self._sliding:
            return []
        return [layer for layer in self._cache.layers if is_sliding(layer)]

    def _keep(self, num_tokens: int) -> None:
        first, last = self._seen, num_tokens // self._layout.block_size
        if first >= last:
            return
        block_size = self._layout.block_size
        for group in self._sliding:
            tensors = []
            for index in self._layout.groups[group].layers:
                layer = self._cache.layers[index]
                start = num_tokens - layer.keys.shape[-2]  # the first token the layer still holds
                if layer.cumulative_length != num_tokens or start > first * block_size:
                    raise LookupError(
                        f"save: layer {index} holds tokens [{start}, {layer.cumulative_length}), not those of "
                        f"blocks [{first}, {last}) out of {num_tokens} tokens"
                    )
                # Cloned: a slice would keep alive the whole recorded past, several times what it shows.
                part = slice(first * block_size - start, last * block_size - start)
                tensors += [layer.keys[:, :, part].clone(), layer.values[:, :, part].clone()]
            self._passed.append(Span(group, first, last, tuple(tensors)))
        self._seen = last

    def _crop(self) -> None:
        for layer in self._layers():
            layer.crop(0)


def _indexes_of(pages: SlotPages, group: int, first: int, last: int) -> npt.NDArray[np.intp]:
    """Where among `pages` those of a group's blocks [first, last) are."""
    return np.flatnonzero((pages.groups == group) & (pages.blocks >= first) & (pages.blocks < last))


def _nothing() -> None:
    """The copies that a CPU has to wait for."""


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, dim] with the tokens of a head in one piece; a copy only where a model left them otherwise."""
    rows = tensor[0]
    dense = rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]
    return rows if dense else rows.contiguous()
