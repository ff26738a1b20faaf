from collections.abc import Callable

import numpy as np
import numpy.typing as npt

POLICIES: tuple[str, ...]

def next_uses(
    offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], num_blocks: int, out: npt.NDArray[np.int32], /
) -> None: ...
def play(
    offsets: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    times: npt.NDArray[np.float64],
    told: npt.NDArray[np.int32],
    num_blocks: int,
    policy: str,
    capacities: tuple[int, ...],
    ttl_s: float,
    options: tuple[bool, bool, int, bool, float, float],
    hits: npt.NDArray[np.int32],
    on_progress: Callable[[int], object] | None,
    /,
) -> tuple[int, ...]: ...
def optimum(
    offsets: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    next_uses: npt.NDArray[np.int32],
    num_blocks: int,
    capacity: int,
    must_keep: bool,
    hits: npt.NDArray[np.int32],
    on_progress: Callable[[int], object] | None,
    /,
) -> None: ...
def access(
    offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], num_blocks: int, policy: str, capacity: int, /
) -> int: ...
