"""CPUs for our threads in a worker of vLLM's.

Where the CPU runs the model, vLLM binds every OpenMP thread of a worker process to a core of its own, the main thread
first. Threads that are started after it inherit that core: a copy would take turns with the model, not run beside it.
So ours may go wherever the engine core, which started the worker, may; vLLM leaves a core or more to such threads
(VLLM_CPU_NUM_OF_RESERVED_CPU).
"""

from __future__ import annotations

import os

BINDINGS = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")  # one of them is how vLLM binds a worker it starts


def copy_cpus() -> frozenset[int] | None:
    """CPUs for threads that copy; None where they may keep what they inherit.

    Only a main thread that OpenMP bound to a single CPU is taken for vLLM's doing; other masks are the operator's.
    """
    if not any(name in os.environ for name in BINDINGS):
        return None
    try:
        own, parents = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
    except (AttributeError, OSError):  # not Linux, or the parent is gone or another user's
        return None
    return frozenset(parents) if len(own) == 1 and own < parents else None
