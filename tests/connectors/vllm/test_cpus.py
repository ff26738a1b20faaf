"""CPUs for copies, asked by processes that are bound as vLLM binds its workers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from connectors.vllm.cpus import BINDINGS

ASK = "import os\n{bind}\nfrom connectors.vllm.cpus import copy_cpus\nprint(sorted(copy_cpus() or ()))"

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs on Linux"
)


def ask(bind: str) -> str:
    done = subprocess.run([sys.executable, "-c", ASK.format(bind=bind)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")


def test_a_process_that_openmp_did_not_bind_stays_where_the_operator_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BINDINGS:
        monkeypatch.delenv(name, raising=False)

    assert ask(f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})") == "[]"


def test_a_process_bound_to_one_cpu_copies_where_its_parent_may() -> None:
    mine = sorted(os.sched_getaffinity(0))

    assert ask(f"os.sched_setaffinity(0, {{{mine[0]}}})") == str(mine)


def test_a_process_that_is_not_bound_copies_where_it_is() -> None:
    assert ask("") == "[]"


def test_what_the_operator_bound_as_well_is_kept() -> None:
    one = min(os.sched_getaffinity(0))
    # The parent of the asking process is bound too, as under `taskset`.
    command = f"import os, subprocess, sys\nos.sched_setaffinity(0, {{{one}}})\n"
    command += f"subprocess.run([sys.executable, '-c', {ASK.format(bind='')!r}], check=True)"

    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
