"""The process's, or the thread's, part in every computation: autocast, modes, global hooks, precision of sums.

None of it is in a model, and all of it changes what a model computes. `standing_modes` names what no page may be made
or used under. `order_of_sums` and `precision` are settings that two processes may have in common, so they are part of
an identity; only values other than torch's defaults are named, but for the few that have always been there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

_SMALLEST = 5e-324  # becomes 0 on a thread that flushes denormal numbers


def standing_modes(device_type: str) -> list[str]:
    """Kinds of what is in force around this call, on this thread or in the whole process: [] if nothing is."""
    import torch
    from torch.nn.modules import module as hooks
    from torch.utils._device import DeviceContext

    found = []
    if torch.is_autocast_enabled(device_type):
        found.append("autocast")
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        found.append("global hooks")
    if depth := torch._C._len_torch_function_stack():
        modes = (torch._C._get_function_stack_at(level) for level in range(depth))
        # A default device says where new tensors lie, and nothing of their values.
        if any(type(mode) is not DeviceContext for mode in modes):
            found.append("torch function mode")
    if torch._C._len_torch_dispatch_stack():
        found.append("torch dispatch mode")
    return found


def order_of_sums() -> str:
    """The settings that decide the order of sums in this process, with versions: results depend on it bit by bit."""
    import torch

    parts = [
        f"torch {torch.__version__}",
        f"transformers {_version('transformers')}",
        f"threads {torch.get_num_threads()}",
        f"matmul {torch.get_float32_matmul_precision()}",
        f"mkldnn {torch.backends.mkldnn.enabled}",
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
    ]
    return " ".join([*parts, *_others(_KERNELS), *filter(None, [precision()])])


def precision() -> str:
    """Settings by which results differ by more than the order of sums; "" where all are torch's own."""
    import torch

    found = _others(_PRECISION)
    if (matmul := torch.get_float32_matmul_precision()) != "highest":
        found.append(f"matmul {matmul}")
    if _SMALLEST * 1.0 == 0.0:
        found.append("flush denormal")
    return " ".join(found)


def _others(settings: dict[str, tuple[Callable[[Any], Any], Any]]) -> list[str]:
    """Those settings that are not torch's default, as text. A setting that this torch does not have is left out."""
    import torch

    found = []
    for name, (read, default) in settings.items():
        try:
            value = read(torch)
        except AttributeError:
            continue
        except RuntimeError:  # torch refuses to read a setting that was made through its newer interface
            value = "mixed"
        if value != default and str(value) != default:
            found.append(f"{name} {value}")
    return found


# Which of several kernels of the same precision is chosen. Defaults of torch 2.4 to 2.13.
_KERNELS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "flash": (lambda torch: torch.backends.cuda.flash_sdp_enabled(), True),
    "efficient": (lambda torch: torch.backends.cuda.mem_efficient_sdp_enabled(), True),
    "math": (lambda torch: torch.backends.cuda.math_sdp_enabled(), True),
    "cudnn_sdp": (lambda torch: torch.backends.cuda.cudnn_sdp_enabled(), True),
    "cudnn": (lambda torch: torch.backends.cudnn.enabled, True),
    "cudnn_benchmark": (lambda torch: torch.backends.cudnn.benchmark, False),
    "cudnn_deterministic": (lambda torch: torch.backends.cudnn.deterministic, False),
    "mkldnn_deterministic": (lambda torch: torch.backends.mkldnn.deterministic, False),
    "reduce_bf16": (lambda torch: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, True),
    "reduce_fp16": (lambda torch: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, True),
}
_PRECISION: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "dtype": (lambda torch: torch.get_default_dtype(), "torch.float32"),
    "fp32": (lambda torch: torch.backends.fp32_precision, "none"),
    "mkldnn_fp32": (lambda torch: torch.backends.mkldnn.fp32_precision, "none"),
    "tf32": (lambda torch: torch.backends.cuda.matmul.allow_tf32, False),
    "fp16_sums": (lambda torch: torch.backends.cuda.matmul.allow_fp16_accumulation, False),
    "fp16_math": (lambda torch: torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(), False),
}


@cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
