"""Is a model still what it was when its pages got their name?

What a model computes is more than its parameters: hooks, methods put over those of a class, attributes of modules,
buffers, its config, the code of its classes, autocast around a call. A page computed under any of these would be found
without it, and the other way round. `ModelWatch` looks at all of them before a model's pages are used or made.

Two rules. What is part of the name (modules, attributes, tensors, config, settings of torch) must be as it was when the
watch was made. What cannot be part of a name, since it may compute anything (hooks, foreign methods, compiled code,
modes of torch), must not be there, even if it was there from the start.

The hard thing: this is asked before every forward of a prompt, so it must cost far less than one. It compares what is
held now with what was held at the last look, by identity, in loops inside the interpreter; only where something differs
is it found out what.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import Any

from connectors.transformers.code import CodeWatch
from connectors.transformers.parts import (
    ModelDifference,
    Part,
    acting_adapters,
    config_changes,
    config_copy,
    configs_of,
    draws,
    intrusions,
    is_moving,
    tuners_of,
)
from connectors.transformers.process import order_of_sums, precision, standing_modes
from connectors.transformers.tensors import TensorWatch

_TENSORS = ("_parameters", "_buffers")
_INNER = ("_modules", "_forward_hooks", "_forward_pre_hooks")
# Of torch's own in every module, what no forward without gradients reads.
_UNUSED = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    }
)


class ModelWatch:
    """Remembers one model as it is now. Any thread.

    bits: whether settings of this process that change only the order of sums must stay as well.
    """

    def __init__(self, model: Any, *, bits: bool) -> None:
        self._model = model
        self._settings = order_of_sums if bits else precision
        self._settings_then = self._settings()
        self._state = _state(model)
        self._device_type = self._state["device"].partition(":")[0]
        self._parts = {path: Part(path, module) for path, module in model.named_modules(remove_duplicate=False)}
        self._tensors = TensorWatch(_tensors_of(model))
        self._tensors.let_go()
        self._configs = [(config, config_copy(config)) for config in configs_of(list(model.modules()))]
        self._code = CodeWatch(model)
        self._last = self._look()

    def findings(self) -> list[ModelDifference]:
        """The differences that keep this model from its pages now, on this thread; [] if there are none."""
        look, found = self._last
        if not look.is_same():
            look, found = self._last = self._look()
        return [*found, *self._around()]

    def is_same_at_a_glance(self) -> bool:
        """True if nothing was added to any module, and no mode is in force: a twentieth of the cost of `findings`."""
        look, found = self._last
        return not found and look.is_same_size() and not standing_modes(self._device_type)

    def _around(self) -> Iterator[ModelDifference]:
        """The differences outside of the model."""
        for kind in standing_modes(self._device_type):
            yield ModelDifference(kind, "")
        if (now := self._settings()) != self._settings_then:
            then = self._settings_then.split()
            yield ModelDifference(
                "numerics", " ".join(word for word in now.split() if word not in then) or "back to default"
            )
        for config, was in self._configs:
            for name in config_changes(config, was):
                yield ModelDifference("config", name)

    def _look(self) -> tuple[_Look, list[ModelDifference]]:
        """Look at everything in the model anew. Remembered first: what changes meanwhile is seen the next time."""
        look = _Look(self._model)
        return look, list(self._differences(look))

    def _differences(self, look: _Look) -> Iterator[ModelDifference]:
        state = _state(self._model)
        yield from (ModelDifference(kind, state[kind]) for kind in state if state[kind] != self._state[kind])
        modules = dict(self._model.named_modules(remove_duplicate=False))
        yield from (ModelDifference("modules", path) for path in self._parts.keys() ^ modules.keys())
        for path, module in modules.items():
            if (part := self._parts.get(path)) is not None:
                yield from part.changes(module)
            yield from intrusions(path, module)
            if any(is_moving(module, name) for name in _names(module)) and not _is_at_rest(module):
                yield ModelDifference("buffers", path)
            if draws(module):
                yield ModelDifference("training", path)
        parameters = dict(self._model.named_parameters())
        for name in self._tensors.changed(_tensors_of(self._model)):
            yield ModelDifference("weights" if name in parameters else "buffers", name)
        yield from (ModelDifference("code", name) for name in {*self._code.replaced(look.code), *look.code.foreign})


class _Look:
    """The content of a model at one moment, in the form that is fastest to compare with a later one."""

    def __init__(self, model: Any) -> None:
        self.code = CodeWatch(model)
        modules = list(model.modules())
        self._model = model
        self._tuners = tuners_of(model)
        self._adapters = acting_adapters(self._tuners)
        self._attention = attention_name(model)
        self._tensors = TensorWatch(_tensors_of(model))
        self._moving = [module for module in modules if any(is_moving(module, name) for name in _names(module))]
        moving = set(map(id, self._moving))
        self._modules = modules
        self._kinds = list(map(type, modules))
        spaces = [vars(module) for module in modules if id(module) not in moving]
        pairs = [(space, name) for space in spaces for name in space if name not in _UNUSED]
        self._holders, self._names = [space for space, _ in pairs], [name for _, name in pairs]
        self._held = [space[name] for space, name in pairs]
        inner = [vars(module)[name] for module in modules if id(module) not in moving for name in _TENSORS]
        inner += [vars(module)[name] for module in modules for name in _INNER]
        self._inner = [space for space in inner if space]
        self._values = list(chain.from_iterable(map(dict.values, self._inner)))
        self._sized = [*spaces, *inner]
        self._size = sum(map(len, self._sized))
        self._still = list(map(_still, self._moving))

    def is_same(self) -> bool:
        """True if nothing has been put in place of anything, and no tensor was written to."""
        return (
            self.is_same_size()
            and all(map(is_, map(dict.get, self._holders, self._names), self._held))
            and all(map(is_, chain.from_iterable(map(dict.values, self._inner)), self._values))
            and all(map(is_, map(type, self._modules), self._kinds))
            and self._tensors.is_same()
            and self.code.is_same()
            and list(map(_still, self._moving)) == self._still
            and attention_name(self._model) == self._attention
            and (not self._tuners or acting_adapters(self._tuners) == self._adapters)
        )

    def is_same_size(self) -> bool:
        """True if no module has more or fewer attributes, tensors, hooks or modules in it."""
        return sum(map(len, self._sized)) == self._size


def attention_name(model: Any) -> str:
    """The implementation of attention, and of the experts where the model has them."""
    config = model.config.get_text_config(decoder=True)
    names = (getattr(config, field, None) for field in ("_attn_implementation", "_experts_implementation"))
    return "+".join(str(name) for name in names if name)


def _state(model: Any) -> dict[str, str]:
    parameter = next(model.parameters(), None)
    return {
        "dtype": str(model.dtype),
        "device": "none" if parameter is None else str(parameter.device),
        "attention": attention_name(model),
        "adapters": acting_adapters(tuners_of(model)),
    }


def _tensors_of(model: Any) -> dict[str, Any]:
    """Parameters and buffers by name, but for those that a rope which depends on the length rewrites as it goes."""
    found = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_moving(module, name):
                found[f"{path}.{name}"] = buffer
    return found


def _names(module: Any) -> list[str]:
    return [*vars(module), *module._buffers]


def _still(module: Any) -> list[tuple[str, int]]:
    """The content of a module that its forwards do not move."""
    held = {**vars(module), **{f"_buffers.{name}": value for name, value in module._buffers.items()}}
    found = [(name, id(value)) for name, value in held.items() if not is_moving(module, name)]
    return [*found, ("at rest", int(_is_at_rest(module)))]


def _is_at_rest(module: Any) -> bool:
    """False if somebody has written to the frequencies of a rope that has not grown; one that has sets them anew."""
    import torch

    for name, first in list(module._buffers.items()):
        prefix, found, rest = name.partition("original_inv_freq")
        if first is None or not found or rest:
            continue
        kind = module.rope_type[prefix.rstrip("_")] if isinstance(module.rope_type, dict) else module.rope_type
        grown = getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached)
        if "dynamic" in kind and int(grown) <= module.original_max_seq_len:
            now = module._buffers.get(f"{prefix}inv_freq")
            if now is not None and not torch.equal(now.to(first.device), first):
                return False
    return True
