"""The linker seat with SGLang's real cache classes. Without SGLang nothing is collected (`make test-sglang`)."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
