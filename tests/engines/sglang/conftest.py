"""SGLang's real cache classes over CPU tensors; no engine runs. See .ci/test-sglang."""

from __future__ import annotations

import warnings

import pytest

# Importing SGLang's cache classes draws in its models and their quantisation, which warn that there is no GPU.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sglang.srt.mem_cache.hicache_storage", reason="needs the environment of .ci/test-sglang")
