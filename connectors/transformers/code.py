"""The code that a model runs: methods of its classes, functions they call by name, torch's operations.

Each of these can be replaced by an assignment to a class or a module, and the model computes something else.
`CodeWatch` remembers all such names at its making, and says which hold something else now.

What was replaced *before* is judged by where it comes from: a function belongs where it is found if its source lies in
torch, transformers, the standard library or the package of its class, and it goes by that name. Everything else is
foreign, until it is put back.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from operator import is_
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

# Classes that every model has, and that are patched for other ends too (saving, loading, moving): only this is run.
_COMMON = (
    "torch.nn.modules.module",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.utils",
    "transformers.integrations.peft",
    "transformers.distributed",
)
_DECORATORS = ("transformers.integrations", "transformers.utils", "transformers.modeling_rope_utils")  # give methods
_OWN = ("torch.", "transformers.", "transformers_modules.")  # the last is where transformers puts code from a hub
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "forward")
_CACHES = ("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer")
# Modules whose functions every model calls, beside those that its classes stand in.
_MODULES = ("torch.nn.functional", "transformers.masking_utils", "transformers.modeling_rope_utils")
_REGISTRIES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
    ("transformers.modeling_rope_utils", "ROPE_INIT_FUNCTIONS"),
)


_TRUSTED = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm")


class Name(NamedTuple):
    """The value of a name in a class, module or registry. code: of a function, whose code can be replaced too."""

    path: str
    value: Any
    code: Any
    foreign: bool


class CodeWatch:
    """The code behind `model`'s modules as it is now. Cheap to ask as long as nothing changes; any thread."""

    def __init__(self, model: Any) -> None:
        self._names: dict[str, Name] = {}
        self._spaces: list[tuple[Mapping[str, Any], list[str], list[Any], int | None]] = []
        for label, space, held, closed in _spaces_of(model):
            for name, value, foreign in held:
                path = f"{label}{name}"
                self._names[path] = Name(path, value, getattr(_function_of(value), "__code__", None), foreign)
            names, values = [name for name, _, _ in held], [value for _, value, _ in held]
            self._spaces.append((space, names, values, len(space) if closed else None))
        functions = [_function_of(name.value) for name in self._names.values() if name.code is not None]
        self._functions, self._codes = functions, [function.__code__ for function in functions]
        self.foreign = [name.path for name in self._names.values() if name.foreign]

    def is_same(self) -> bool:
        """True as long as no name holds something else, and no class has more or fewer names."""
        return all(
            (size is None or len(space) == size) and all(map(is_, map(space.get, names), values))
            for space, names, values, size in self._spaces
        ) and all(map(is_, [function.__code__ for function in self._functions], self._codes))

    def replaced(self, now: CodeWatch) -> list[str]:
        """Names that hold something else in a later watch of the same model.

        What is foreign now is told by `now.foreign`; what was foreign and belongs now has been put back.
        """
        found = []
        for path in self._names.keys() | now._names.keys():
            was, is_now = self._names.get(path), now._names.get(path)
            if was is None or is_now is None:
                # A class may gain a method that hides an inherited one. A module may gain any name: nothing calls it.
                if ":" in path:
                    found.append(path)
            elif (was.value is not is_now.value or was.code is not is_now.code) and not was.foreign:
                found.append(path)
        return sorted(found)


def source_digests(kinds: set[type]) -> Iterator[tuple[str, str]]:
    """(class, digest of its source file) of those classes that are neither torch's nor transformers'."""
    import xxhash

    for kind in sorted(kinds, key=label_of):
        if kind.__module__.partition(".")[0] not in ("torch", "transformers"):
            file = _file_of(kind.__module__)
            text = Path(file).read_bytes() if file and Path(file).is_file() else b""
            yield label_of(kind), str(xxhash.xxh3_128_hexdigest(text))


def label_of(kind: Any) -> str:
    """Module and name of a class or function."""
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


_Held = list[tuple[str, Any, bool]]  # name, value, foreign


def _spaces_of(model: Any) -> Iterator[tuple[str, Mapping[str, Any], _Held, bool]]:
    """(label, name space, names to watch in it, whether a new name matters) of all that may be run."""
    import torch
    from transformers import cache_utils

    kinds = {base for module in model.modules() for base in type(module).__mro__}
    for name in _CACHES:
        kinds.update(getattr(cache_utils, name).__mro__)
    kinds = {kind for kind in kinds if kind.__module__ not in ("builtins", "abc", "typing", "collections")}
    for kind in kinds:
        common = kind.__module__.startswith(_COMMON)
        yield f"{label_of(kind)}:", vars(kind), list(_methods(kind, common)), not common
    # Of a caller's own file only the classes: its other names come and go with what else is written there.
    files = {kind.__module__ for kind in kinds if kind.__module__.startswith(_OWN)} | set(_MODULES)
    files = {file for file in files if not file.startswith(_COMMON)}
    for file in files & sys.modules.keys():
        yield f"{file}.", vars(sys.modules[file]), list(_functions(sys.modules[file])), False
    yield "torch.", vars(torch), list(_operations(torch)), False
    for file, registry in _REGISTRIES:
        held = getattr(sys.modules.get(file), registry, None)
        if held is not None:
            entries = [(name, value, not _is_from(value, ())) for name, value in held.items() if callable(value)]
            yield f"{registry}.", held, entries, False


def _methods(kind: type, common: bool) -> Iterator[tuple[str, Any, bool]]:
    for name, value in list(vars(kind).items()):
        function = _function_of(value)
        if not isinstance(function, FunctionType) or (common and name not in _CALLS):
            continue
        inner = _innermost(function)
        named = inner.__name__ == name and inner.__qualname__.startswith(kind.__qualname__)
        named = named or common or inner.__module__.startswith(_DECORATORS)
        yield name, value, not (named and _is_from(function, (kind.__module__,)))


def _functions(module: ModuleType) -> Iterator[tuple[str, Any, bool]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, FunctionType):
            inner = _innermost(value)
            own = inner.__module__ == module.__name__
            named = not own or inner.__name__.lstrip("_") == name.lstrip("_")
            yield name, value, not (named and _is_from(value, (module.__name__,)))
        elif isinstance(value, (BuiltinFunctionType, type, ModuleType)):
            yield name, value, False


def _operations(torch: Any) -> Iterator[tuple[str, Any, bool]]:
    for name in dir(torch._C._VariableFunctions):
        value = vars(torch).get(name)
        if not name.startswith("_") and callable(value):
            yield name, value, not (isinstance(value, BuiltinFunctionType) or _is_from(value, ()))


def _function_of(value: Any) -> Any:
    """The function behind a static method, class method or property; else the value itself."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _innermost(function: Any) -> Any:
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        function = inner
    return function


def _is_from(function: Any, modules: tuple[str, ...]) -> bool:
    """True if the function, and all that it wraps, were written in a trusted place or in the package of `modules`."""
    roots = tuple(root for root in map(_root_of, modules) if root)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return isinstance(function, BuiltinFunctionType)
        if not (code.co_filename.startswith(roots) or _is_trusted(code.co_filename)):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@cache
def _is_trusted(file: str) -> bool:
    """True in the standard library, and in transformers and what it imports names from."""
    if file.startswith(tuple(f"{_root_of(package)}{os.sep}" for package in _TRUSTED if package in sys.modules)):
        return True
    stdlib = sysconfig.get_paths()["stdlib"] + os.sep
    return file.startswith("<frozen") or (file.startswith(stdlib) and "-packages" not in file.removeprefix(stdlib))


def _root_of(module: str) -> str:
    """The folder of a module's package, or the file of a module that stands alone."""
    package = sys.modules.get(module.partition(".")[0])
    paths = list(getattr(package, "__path__", []))
    return str(paths[0]) if paths else _file_of(module)


def _file_of(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__file__", None) or "")
