from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.devices.base import Int64s

def gather(
    base: Int64s,
    page_stride: Int64s,
    num_runs: Int64s,
    run_stride: Int64s,
    run_bytes: Int64s,
    page_ids: Int64s,
    slots: Sequence[npt.NDArray[np.uint8]],
    first_page: int,
    num_pages: int,
    stream: int,
    /,
) -> int: ...
def scatter(
    base: Int64s,
    page_stride: Int64s,
    num_runs: Int64s,
    run_stride: Int64s,
    run_bytes: Int64s,
    page_ids: Int64s,
    slots: Sequence[npt.NDArray[np.uint8]],
    first_page: int,
    num_pages: int,
    stream: int,
    /,
) -> int: ...
