"""The tensors of a model: has one been replaced, written to, or moved since this was made?

Told by identity, address, shape and torch's own version counter, which every write moves but one that goes through
`tensor.data` or around autograd. On a CPU a few elements of each tensor are compared too, so that such a write over a
whole tensor (a LoRA merged into the weights) is seen; one that changes single elements is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # an element's bits, by its size


class TensorWatch:
    """Remembers `tensors` (name -> tensor) as they are. Any thread.

    Of tensors on a CPU it holds the memory, so that it can look into them, until `let_go`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._places = {name: place for place, name in enumerate(tensors)}
        self._refs = [weakref.ref(tensor) for tensor in tensors.values()]
        self._marks = [_mark(tensor) for tensor in tensors.values()]
        plain = [mark for mark in self._marks if mark.version >= 0]
        self._versions = [mark.version for mark in plain]
        self._addresses = [mark.address for mark in plain]
        self._strides = [mark.strides for mark in plain]
        self._views = [_bits(tensor) for tensor in tensors.values()]
        self._seen = [_sample(view) for view in self._views]

    def is_same(self) -> bool:
        """True as long as all tensors are alive and unwritten. That they still are the model's is not asked."""
        tensors: list[Any] = [ref() for ref in self._refs]
        if any(map(is_, tensors, repeat(None))):
            return False
        plain = [tensor for tensor, mark in zip(tensors, self._marks, strict=True) if mark.version >= 0]
        return (
            [tensor._version for tensor in plain] == self._versions
            and [tensor.data_ptr() for tensor in plain] == self._addresses
            and [tensor.stride() for tensor in plain] == self._strides
            and [_sample(view) for view in self._views] == self._seen
        )

    def changed(self, now: Mapping[str, torch.Tensor]) -> list[str]:
        """Names that are new, gone, or not as they were."""
        found = [name for name in self._places if name not in now]
        for name, tensor in now.items():
            place = self._places.get(name)
            if place is None or self._refs[place]() is not tensor or self._differs(place, tensor):
                found.append(name)
        return sorted(found)

    def let_go(self) -> None:
        """Hold no memory any more; from now on only `changed` may be asked."""
        self._views = []

    def _differs(self, place: int, tensor: torch.Tensor) -> bool:
        return _mark(tensor) != self._marks[place] or _sample(_bits(tensor)) != self._seen[place]


class _Mark(NamedTuple):
    """The properties that an in-place write, a move or new `data` changes. version: -1 where the tensor keeps none."""

    version: int
    address: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


def _mark(tensor: Any) -> _Mark:
    try:
        version = -1 if tensor.is_inference() else tensor._version
        return _Mark(version, tensor.data_ptr(), tensor.stride(), tuple(tensor.shape), tensor.dtype)
    except (AttributeError, NotImplementedError, RuntimeError):  # of a kind that has no memory of its own
        return _Mark(-1, id(tensor), (), (), None)


def _bits(tensor: Any) -> memoryview | None:
    """The elements of a plain tensor on the CPU, without a copy; None of any other."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return None
    kind = _FORMATS.get(tensor.element_size())
    if kind is None or tensor.layout is not torch.strided or not tensor.is_contiguous() or not tensor.numel():
        return None
    elements: memoryview[int] = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()).cast(kind)
    return elements


def _sample(view: memoryview | None) -> tuple[int, ...]:
    """The first, the middle and the last element."""
    return () if view is None else (view[0], view[len(view) // 2], view[-1])
