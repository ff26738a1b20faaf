"""The whole path of the pages that SGLang asks about.

SGLang hands a linker the hashes of the pages that its own pools lack, and of the pages of a tree node; the hashes of
the pages before them stay with its tree. A store needs them: a block is known there by all that it continues, also to
the engines and machines that share it. The tree tells them by node (`get_prefix_hash_values`), and the node is a
variable of the caller, `UnifiedCacheLinkerWrapper`: it is read there, once a call, and nothing in SGLang is changed for
it.

That is bound to the release (connectors.sglang.versions): `check_callers` refuses one that keeps the node elsewhere. A
call from anywhere else has no path: a miss, or an offload that ends badly.

The scheduler's thread.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, Protocol

from kvstore.errors import ConfigError

MAX_FRAMES = 4  # between a linker's method and SGLang's wrapper
_NEEDS = {"match": ("self", "result", "device_hit_len"), "_offload_node": ("self", "node_id")}


class Paths(Protocol):
    """The hashes before the pages of the call under way."""

    def before_lookup(self) -> list[str] | None:
        """Of the pages in SGLang's own pools that a lookup continues; None if that is not known."""

    def before_offload(self) -> list[str] | None:
        """Of the pages that a node's pages continue; None if that is not known."""


class TreePaths:
    """Paths from SGLang's tree, by the wrapper class that calls the linker."""

    def __init__(self, wrapper: type) -> None:
        check_callers(wrapper)
        self._match: CodeType = vars(wrapper)["match"].__code__
        self._offload: CodeType = vars(wrapper)["_offload_node"].__code__

    def before_lookup(self) -> list[str] | None:
        """Of the pages in SGLang's own pools that a lookup continues."""
        caller = _caller(self._match)
        if caller is None:
            return None
        cache, num_tokens = caller["self"].cache, caller["device_hit_len"]
        if not num_tokens:
            return []
        node = caller["result"].last_device_node
        path = [*cache.get_prefix_hash_values(node), *cache.tree_core.get_hash_values(node)]
        return path if len(path) * cache.page_size == num_tokens else None

    def before_offload(self) -> list[str] | None:
        """Of the pages that a node's pages continue."""
        caller = _caller(self._offload)
        return None if caller is None else list(caller["self"].cache.get_prefix_hash_values(caller["node_id"]))


def check_callers(wrapper: type) -> None:
    """Raise ConfigError unless SGLang's wrapper keeps what is read of it."""
    for name, needed in _NEEDS.items():
        code = getattr(vars(wrapper).get(name), "__code__", None)
        missing = [one for one in needed if code is None or one not in code.co_varnames]
        if missing:
            raise ConfigError(
                f"SGLang's {wrapper.__name__}.{name} has no {' and '.join(missing)}, which tells where pages hang in "
                "its tree; this build of SGLang is not the one that this release of kvtiers was tried with"
            )


def _caller(code: CodeType) -> dict[str, Any] | None:
    """The variables of the caller that runs `code`."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(MAX_FRAMES):
        if frame is None:
            break
        if frame.f_code is code:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None
