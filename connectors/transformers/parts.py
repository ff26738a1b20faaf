"""The parts of a model: its modules with their attributes, hooks and methods, and its configs.

Read by `ModelWatch`, which asks whether they are as they were, and by the identity of a model, which writes them down.
A finding is a kind, which counters go by, and a place for the log.

The hard thing: what is known to be harmless must be provably so. That is transformers' own recording of hidden states,
whose hooks return nothing, and accelerate's hook that moves inputs to the device of weights which stay where they are.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from connectors.transformers.code import label_of, source_digests

_PLAIN = (int, float, str, bool, type(None))
# Put over a model's own by accelerate: they warn about moving it, and compute nothing.
_MOVERS = frozenset({"to", "cuda", "cpu", "npu", "xpu", "mlu", "sdaa", "musa"})
# Of a config: where a model was found or how its output is wrapped. The implementations are looked at by themselves.
_COSMETIC = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "architectures",
        "id2label",
        "label2id",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
    }
)


class ModelDifference(NamedTuple):
    """A difference from what should be. kind: one of few words; where: the module, name or setting."""

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.where})" if self.where else self.kind


class Part:
    """One module as it was: which it was, of which class, with which attributes. Holds neither it nor its tensors."""

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self._ref = weakref.ref(module)
        self._kind = type(module)
        self._attributes = {name: _kept(value) for name, value in attributes_of(module)}

    def changes(self, module: Any) -> Iterator[ModelDifference]:
        """The differences in `module`, which is at this place now.

        An attribute that has come is none, unless it hides one of the class: nothing that ran before can have read it.
        """
        if self._ref() is not module or type(module) is not self._kind:
            yield ModelDifference("modules", self.path)
            return
        now = dict(attributes_of(module))
        for name, kept in self._attributes.items():
            if name not in now or not _is_kept(kept, now[name]):
                yield ModelDifference("training" if name == "training" else "attributes", f"{self.path}.{name}")
        for name in now.keys() - self._attributes.keys():
            if hasattr(type(module), name) and not callable(now[name]):
                yield ModelDifference("attributes", f"{self.path}.{name}")


def attributes_of(module: Any) -> Iterator[tuple[str, Any]]:
    """A module's own attributes, without torch's containers, methods put over its class's, and what forwards move."""
    containers = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
    for name, value in list(vars(module).items()):
        if name in containers or name.endswith("_hooks") or "_hooks_" in name or is_moving(module, name):
            continue
        if not (callable(value) and hasattr(type(module), name)) and name not in ("_hf_hook", "_old_forward"):
            yield name, value


def is_moving(module: Any, name: str) -> bool:
    """True for what a rope that depends on the length writes while it runs."""
    if not name.endswith(("inv_freq", "max_seq_len_cached")) or name.endswith("original_inv_freq"):
        return False
    kinds = getattr(module, "rope_type", "")
    return any(kind in str(kinds) for kind in ("dynamic", "longrope"))


def intrusions(path: str, module: Any) -> Iterator[ModelDifference]:
    """The code that computes in a module beside its class: hooks, methods put over the class's own, compiled code."""
    for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
        if not _only_records(hook):
            yield ModelDifference("hooks", path)
    for name, value in list(vars(module).items()):
        hides = callable(value) and hasattr(type(module), name) and not _is_module(value)
        if hides and name not in _MOVERS and not (name == "forward" and _only_aligns(module, value)):
            yield ModelDifference("methods", f"{path}.{name}".lstrip("."))
    kind = type(module)
    compiled = getattr(module, "_compiled_call_impl", None) is not None or kind.__name__ == "OptimizedModule"
    if compiled or kind.__module__.startswith(("torch.jit", "torch.fx")):
        yield ModelDifference("compiled", path)


def draws(module: Any) -> bool:
    """True for a module in training mode that may draw random numbers by it: dropout, and what has a rate of it.

    A module that was put in later (an adapter) is in training mode although its model is not; most never look.
    """
    kind = type(module)
    if not module.training:
        return False
    if kind.__module__.startswith(("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")):
        return True
    rates = {name: value for name, value in vars(module).items() if "drop" in name}
    if kind.__module__ == "torch.nn.modules.dropout":
        rates["p"] = getattr(module, "p", 0.0)
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates.values())


def configs_of(modules: Sequence[Any]) -> list[Any]:
    """The configs that modules look at, each once; a config inside another is reached through it too."""
    found: dict[int, Any] = {}
    for module in modules:
        config = vars(module).get("config")
        if config is not None and hasattr(config, "to_dict"):
            found.setdefault(id(config), config)
    return list(found.values())


def config_copy(config: Any) -> dict[str, Any]:
    """The content of a config now, without what is cosmetic."""
    return {
        name: config_copy(value) if hasattr(value, "to_dict") else copy.deepcopy(value)
        for name, value in vars(config).items()
        if name not in _COSMETIC
    }


def config_changes(config: Any, was: Mapping[str, Any]) -> Iterator[str]:
    """Names of fields that say something else than in the copy."""
    values = vars(config)
    for name, value in list(values.items()):
        if name in _COSMETIC:
            continue
        if name not in was:
            yield name
        elif isinstance(was[name], dict) and hasattr(value, "to_dict"):
            yield from (f"{name}.{field}" for field in config_changes(value, was[name]))
        elif value is not was[name] and value != was[name]:
            yield name
    yield from (name for name in was if name not in values)


def tuners_of(model: Any) -> list[tuple[str, Any]]:
    """The modules that PEFT has put around others. By their attributes, so that PEFT need not be installed."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if "base_layer" in getattr(module, "_modules", {}) and hasattr(module, "active_adapters")
    ]


def acting_adapters(tuners: Sequence[tuple[str, Any]]) -> str:
    """Names of the adapters in force, and a digest of where and how strongly they act; "" if there are none."""
    names: set[str] = set()
    acting = []
    for path, module in tuners:
        active = [] if getattr(module, "disable_adapters", False) else list(module.active_adapters)
        merged = list(getattr(module, "merged_adapters", ()))
        names.update(active, merged)
        acting.append((path, active, merged, sorted(dict(getattr(module, "scaling", {})).items())))
    if not names:
        return ""
    return "+".join(sorted(names)) + "#" + hashlib.sha256(repr(acting).encode()).hexdigest()[:16]


def structure_digest(model: Any) -> str:
    """32 hex digits of all modules: their places, classes and plain attributes, and sources of foreign classes."""
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        told = [
            f"{name}={_told(value)}"
            for name, value in sorted(attributes_of(module))
            if not name.startswith("_") and name not in ("training", "name_or_path") and _told(value) is not None
        ]
        if module.training:
            told.append("training")
        digest.update("|".join([path, label_of(type(module)), *told, ""]).encode())
    for label, source in source_digests({type(module) for module in model.modules()}):
        digest.update(f"{label}|{source}|".encode())
    return digest.hexdigest()[:32]


def _told(value: Any) -> str | None:
    """An attribute as text that is the same in every process; None for what cannot be told so."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)) and all(isinstance(item, _PLAIN) for item in value):
        return repr(tuple(value))
    return label_of(value) if isinstance(value, (FunctionType, type)) else None


def _kept(value: Any) -> Any:
    """A value to compare with later: plain ones and lists of them as they are, of others a weak reference."""
    if isinstance(value, (*_PLAIN, tuple)):
        return value
    if isinstance(value, (list, dict, set)):
        return copy.copy(value)
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _is_kept(kept: Any, value: Any) -> bool:
    if isinstance(kept, weakref.ref):
        return kept() is value
    if kept is value:
        return True
    try:
        return type(kept) is type(value) and isinstance(kept, (*_PLAIN, tuple, list, dict, set)) and bool(kept == value)
    except (RuntimeError, ValueError):  # tensors within, which cannot be compared so
        return False


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _only_records(hook: Any) -> bool:
    """True for the hook by which transformers records hidden states where a caller asks for them: it returns None."""
    code = getattr(hook, "__code__", None)
    owner = "transformers.utils.output_capturing"
    return code is not None and code.co_name == "output_capturing_hook" and hook.__module__ == owner


def _only_aligns(module: Any, forward: Any) -> bool:
    """True where accelerate's wrapper only moves inputs to the weights' device, and calls the class's own forward."""
    if not (isinstance(forward, functools.partial) and getattr(forward.func, "__module__", "") == "accelerate.hooks"):
        return False
    hook, inner = vars(module).get("_hf_hook"), vars(module).get("_old_forward")
    if getattr(inner, "__func__", None) is not type(module).forward:
        return False
    return all(label_of(type(one)) == "accelerate.hooks.AlignDevicesHook" and not one.offload for one in _hooks(hook))


def _hooks(hook: Any) -> list[Any]:
    if label_of(type(hook)) == "accelerate.hooks.SequentialHook":
        return [one for inner in hook.hooks for one in _hooks(inner)]
    return [hook]
