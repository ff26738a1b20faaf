"""The compiled codes under the address and undefined-behaviour sanitizers, where the compiler has them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "kvstore" / "codecs" / "_quant.c"
COMPILER = shutil.which("gcc")

DRIVE = """
import sys
import numpy as np
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("kvstore.codecs._quant", sys.argv[1])
code = module_from_spec(spec)
spec.loader.exec_module(code)
rng = np.random.default_rng(0)
for heads, tokens, dims in ((1, 1, 8), (2, 70, 24), (3, 16, 64), (1, 33, 1024), (2, 5, 136)):
    size = heads * tokens * dims * 2
    table = np.array([(1, 0, heads, tokens * dims * 2, tokens, dims * 2, dims),
                      (0, size, heads, tokens * dims * 2, tokens, dims * 2, dims)], np.int64)
    for bits, key_group, value_group in ((8, 64, 1024), (6, 64, 64), (4, 32, 32), (4, 1, 8)):
        plan = code.make_plan(table, 2 * size, bits, key_group, value_group, 1)
        for skip in (0, 1):
            for portable in (0, 1):
                page = rng.integers(0, 1 << 16, size).astype("<u2").tobytes()  # with infinities, and what is no number
                blob, back = np.zeros(code.coded_bytes(plan, skip), np.uint8), np.zeros(2 * size, np.uint8)
                code.encode(plan, page, blob, skip, portable)
                for junk in (blob, rng.integers(0, 256, len(blob)).astype(np.uint8)):
                    junk = np.concatenate([blob[:8], junk[8:]])
                    try:
                        code.decode(plan, junk, back, portable)
                    except ValueError:
                        pass
                page = (rng.integers(0x3F00, 0x4100, size) | rng.integers(0, 2, size) << 15).astype("<u2").tobytes()
                assert code.encode(plan, page, blob, skip, portable) < 1
                code.decode(plan, blob, back, portable)
far = table.copy()
far[0, 1] = (1 << 63) - 2
for wrong in (table * -1, table * (1 << 40), np.full((3, 7), 1 << 62), np.zeros((0, 7), np.int64), far):
    try:
        code.make_plan(wrong.astype(np.int64), 2 * size, 8, 64, 64, 1)
    except ValueError:
        continue
    raise AssertionError(wrong)
print("sound")
"""


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="no gcc")
def test_the_compiled_codes_touch_no_byte_that_is_not_theirs(tmp_path: Path) -> None:
    library = tmp_path / "_quant.so"
    build = [
        COMPILER or "gcc", "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", f"-I{sysconfig.get_paths()['include']}", str(SOURCE), "-o", str(library),
    ]  # fmt: skip
    if subprocess.run(build, capture_output=True, timeout=300).returncode:
        pytest.skip("this gcc has no sanitizers")
    found = subprocess.run([COMPILER or "gcc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = found.stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("no libasan beside this gcc")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-c", DRIVE, str(library)], capture_output=True, text=True, env=environment, timeout=300
    )

    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-4000:]
