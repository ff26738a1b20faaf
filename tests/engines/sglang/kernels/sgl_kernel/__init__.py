"""Stands in for SGLang's compiled kernels, of which there is no build for a processor without a GPU: every call raises.

Half of SGLang's modules import names from `sgl_kernel` at their top, its cache classes among them, and never call one
where the tensors are on the CPU. With this package they can be imported and tested as they are. It computes nothing:
a test that would reach a kernel fails here, and belongs where a GPU is (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a GPU's: there is no build of it for this machine")

    return kernel
