"""The hooks that vLLM and SGLang call in each of their processes (entry points `vllm.general_plugins` and
`sglang.srt.plugins`), whether they use us or not.

They give our names to the engine's factories, so that "KVStoreConnector", "KVStoreTier" and "KVStoreBackend" are enough
in a configuration. An engine that does not use us must not notice that we are installed: nothing is imported here (the
connectors' factory alone draws in 457 modules, 2 seconds), and no exception leaves it. So the names are given at once
where a factory is loaded already, and else when the engine loads it itself. Where a factory is gone or another, the
module path in the configuration still works.

The classes are had by way of this module, so that a folder `connectors` of the user's own does not hide ours.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from kvstore import names

CONNECTOR, TIER, BACKEND = "KVStoreConnector", "KVStoreTier", "KVStoreBackend"
_HOMES = {CONNECTOR: "connectors.vllm", TIER: "connectors.vllm_tier", BACKEND: "connectors.sglang"}

log = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM where our connector and our tier are. Idempotent."""
    _tell(FACTORIES)


def register_sglang() -> None:
    """Tell SGLang where our storage backend is. Idempotent."""
    _tell(SGLANG_FACTORIES)


def _tell(factories: dict[str, Callable[[Any], None]]) -> None:
    waiting = {}
    for name, add in factories.items():
        if name in sys.modules:
            _told(add, sys.modules[name])
        else:
            waiting[name] = add
    if waiting and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(waiting))


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    names.load_ours("connectors")
    return getattr(import_module(home), name)


def _add_connector(factory: Any) -> None:
    if CONNECTOR not in factory.KVConnectorFactory._registry:
        factory.KVConnectorFactory.register_connector(CONNECTOR, __name__, CONNECTOR)


def _add_tier(factory: Any) -> None:
    if TIER not in factory.SecondaryTierFactory._registry:
        factory.SecondaryTierFactory.register_tier(TIER, __name__, TIER)


def _add_backend(factory: Any) -> None:
    """A factory of "dynamic" backends that needs no path of a module and no class for ours.

    It has a registry, but takes from it no name that is not built in.
    """
    create = factory.StorageBackendFactory._create_dynamic_backend

    def create_dynamic_backend(backend_config: dict[str, Any], *given: Any, **more: Any) -> Any:
        if backend_config.get("backend_name") == BACKEND:
            backend_config = {"module_path": __name__, "class_name": BACKEND, **backend_config}
        return create(backend_config, *given, **more)

    if create.__name__ != create_dynamic_backend.__name__:
        factory.StorageBackendFactory._create_dynamic_backend = staticmethod(create_dynamic_backend)


FACTORIES: dict[str, Callable[[Any], None]] = {
    "vllm.distributed.kv_transfer.kv_connector.factory": _add_connector,
    "vllm.v1.kv_offload.tiering.factory": _add_tier,
}
SGLANG_FACTORIES: dict[str, Callable[[Any], None]] = {
    "sglang.srt.mem_cache.storage.backend_factory": _add_backend,
}


def _told(add: Callable[[Any], None], factory: Any) -> None:
    try:
        add(factory)
    except Exception as error:  # another version of the engine: anything may be missing
        log.debug("kvstore: %s: %s: %s", add.__name__, type(error).__name__, error)


class _Watch:
    """Sees the factories being imported, and leaves when both were. Any thread."""

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        add = self._waiting.get(name)
        spec = None if add is None else PathFinder.find_spec(name, path, target)
        if add is not None and spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda module: self._loaded(name, add, module))
        return spec

    def _loaded(self, name: str, add: Callable[[Any], None], module: ModuleType) -> None:
        _told(add, module)
        self._waiting.pop(name, None)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """The module's own loader, with a word afterwards. It is gone from the module when the module has run."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module)
