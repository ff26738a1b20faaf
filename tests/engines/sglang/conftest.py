"""SGLang's real cache classes over CPU tensors; no engine runs. Elsewhere nothing is collected (`make test-sglang`)."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # The linker's tests fork: a child of a process whose OpenMP threads have started hangs in its first parallel loop.
    importlib.import_module("torch").set_num_threads(1)
    # Importing SGLang's cache classes draws in its models and their quantisation, which warn that there is no GPU.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("sglang.srt.mem_cache.hicache_storage")
