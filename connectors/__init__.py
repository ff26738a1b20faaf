"""Engines plug in here.

vllm           a KV connector for vLLM
vllm_tier      a tier below vLLM's own offloading
transformers   a model with a cache behind it
llamacpp       the state of llama-server's slots, cut into pages
weights        which weights a model has
base           what connectors have in common
"""

from importlib import util as _util
from pathlib import Path as _Path

_OURS = _Path(__file__).resolve().parents[1] / "kvstore"
_FOUND = _util.find_spec("kvstore")
if _FOUND is None or str(_OURS) not in map(str, (_Path(p).resolve() for p in _FOUND.submodule_search_locations or ())):
    # Told here, far from where it would be missed: kvstore cannot tell it of itself.
    raise ImportError(
        f"kvtiers: the name kvstore leads to {_FOUND and _FOUND.origin}, not to {_OURS}, which these connectors belong "
        f"to: take that one off the path, or uninstall the distribution that brings it"
    )
