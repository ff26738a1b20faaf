"""Policies of the compiled engine agree with libCacheSim, block by block.

Needs `pip install libcachesim==0.3.5`. With KVTIERS_TRACE naming a trace, that one is compared, too, and told:

    KVTIERS_TRACE=conversation_trace.jsonl pytest tests/kvstore/lab/test_agreement.py -s
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.lab import compiled
from kvstore.lab.compiled import TraceArrays
from kvstore.lab.traces import read_trace
from tests.kvstore.lab.test_compiled import forest_traffic

pytestmark = pytest.mark.skipif(not compiled.is_built, reason="kvstore.lab._sweep is not built")

THEIRS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "arc": "ARC",
    "sieve": "Sieve",
    "s3fifo-paper": "S3FIFO",
    "min": "Belady",
}
SHARES = (0.01, 0.05, 0.10, 0.25)
MOST_APART = 1e-4

# A record of what libCacheSim calls an oracleGeneral trace: time, object, size, when it comes next (-1 never).
RECORD = np.dtype([("time", "<u4"), ("block", "<u8"), ("size", "<u4"), ("next", "<i8")])


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("libcachesim", reason="libcachesim is not installed: nothing to agree with")


@pytest.fixture(scope="module", params=["made up", "real"])
def arrays(request: pytest.FixtureRequest) -> TraceArrays:
    if request.param == "made up":
        return TraceArrays.of(forest_traffic(1, num_requests=6000, width=9, depth=8))
    if "KVTIERS_TRACE" not in os.environ:
        pytest.skip("KVTIERS_TRACE names no trace")
    return TraceArrays.of(read_trace(Path(os.environ["KVTIERS_TRACE"])))


@pytest.fixture(scope="module")
def records(arrays: TraceArrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the trace as libCacheSim reads it."""
    num = len(arrays.ids)
    found = np.zeros(num, RECORD)
    found["time"], found["block"], found["size"] = np.arange(num), arrays.ids, 1
    last: dict[int, int] = {}
    following = np.full(num, -1, np.int64)
    for at in range(num - 1, -1, -1):
        block = int(arrays.ids[at])
        following[at] = last.get(block, -1)
        last[block] = at
    found["next"] = following
    path = tmp_path_factory.mktemp("libcachesim") / "trace.oracleGeneral"
    found.tofile(path)
    return path


@pytest.mark.parametrize("policy", list(THEIRS))
def test_hit_rates_agree_with_libcachesim(library: Any, arrays: TraceArrays, records: Path, policy: str) -> None:
    for share in SHARES:
        num_blocks = int(arrays.num_blocks * share)
        reader = library.TraceReader(trace=str(records), trace_type=library.TraceType.ORACLE_GENERAL_TRACE)
        missed, _ = getattr(library, THEIRS[policy])(cache_size=num_blocks).process_trace(reader)

        ours = compiled.access(arrays, policy, num_blocks) / len(arrays.ids)

        print(f"{policy:13} {share:4.0%} {num_blocks:7} blocks: ours {ours:.5f}, libcachesim {1 - missed:.5f}")
        assert ours == pytest.approx(1 - missed, abs=MOST_APART)
