"""Who may import whom, read from the sources: the drawing in the design, kept true.

Every import counts, also one inside a function: a lazy import hides a circle from the interpreter, not from the reader.
Names imported for the type checker alone load nothing, but a reader has to follow them too: they point downwards and
close no circle.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("radix", "eviction", "kvstore", "connectors")

# The longest matching prefix decides; a module with no rule may import anything of ours but connectors.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "radix": ("radix",),
    "eviction": ("eviction", "radix.ordered"),
    "kvstore.errors": (),
    "kvstore.clock": (),
    "kvstore.units": (),
    "kvstore.direction": (),
    "kvstore.forks": ("kvstore.errors",),
    "kvstore.ownership": ("kvstore.errors",),
    "kvstore.limits": (),
    "kvstore.layout": ("kvstore.errors",),
    "kvstore.page": ("kvstore.errors",),
    "kvstore.codecs": (
        "kvstore.codecs",
        "kvstore.errors",
        "kvstore.extras",
        "kvstore.layout",
        "kvstore.page",
        "radix.hashing",
    ),
    "kvstore.config.secret": ("kvstore.errors", "kvstore.tiers.redis.url"),
    "kvstore.config.paths": (),
    "kvstore.names": (),
    "kvstore.engines": ("kvstore.names",),  # what engines load in all their processes
    "kvstore.plugins": ("kvstore.errors",),
    "kvstore.config.section": (),
    "kvstore.policies": ("eviction", "kvstore.errors", "kvstore.plugins"),
    "kvstore.config.values": ("kvstore.config.paths", "kvstore.errors", "kvstore.policies", "kvstore.units"),
    "kvstore.config.sources": (
        "kvstore.config.paths",
        "kvstore.config.secret",
        "kvstore.errors",
        "kvstore.ownership",
        "kvstore.tiers.registry",
    ),
    "kvstore.config.sections": (
        "kvstore.config.section",
        "kvstore.config.sources",
        "kvstore.config.values",
        "kvstore.errors",
        "kvstore.tiers.kind",
        "kvstore.tiers.registry",
        "kvstore.units",
    ),
    "kvstore.config.reference": (
        "kvstore.config.sections",
        "kvstore.config.paths",
        "kvstore.config.values",
        "kvstore.config.sources",
        "kvstore.policies",
        "kvstore.tiers.registry",
        "kvstore.units",
    ),
    "kvstore.metrics": (),
    "kvstore.hints": ("kvstore.hints",),  # what is said, and what is answered; knows no store
    "kvstore.hinting": (
        "kvstore.errors",
        "kvstore.hints",
        "kvstore.plan.records",
        "kvstore.plan.wishes",
        "kvstore.requests",
    ),
    "kvstore.base": (  # the face, with the values that go over it
        "kvstore.errors",
        "kvstore.hints.outcome",
        "kvstore.layout",
        "kvstore.plan.journal",
        "kvstore.plan.records",
        "kvstore.waits",
    ),
    "kvstore.waits": ("kvstore.plan.records",),
    "kvstore.keep": ("kvstore.dispatcher", "kvstore.plan.in_steps", "kvstore.plan.records", "kvstore.requests"),
    "kvstore.opening": (
        "kvstore.base",
        "kvstore.build",  # the store in this process, where no daemon is named
        "kvstore.config.sections",
        "kvstore.layout",
        "kvstore.service.client",
        "radix.namespace",
    ),
    "kvstore.dispatcher": ("kvstore.errors", "kvstore.forks", "kvstore.move", "kvstore.plan"),
    "kvstore.admin": (
        "eviction.policy",
        "kvstore.dispatcher",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.move",
        "kvstore.plan",
        "kvstore.tiers.base",
    ),
    "kvstore.plan": (
        "radix",
        "eviction",
        "kvstore.clock",
        "kvstore.direction",
        "kvstore.hints",
        "kvstore.layout",
        "kvstore.page",
        "kvstore.errors",
        "kvstore.plan",
    ),
    "kvstore.tiers": (
        "radix.untracked",
        "kvstore.direction",
        "kvstore.layout",
        "kvstore.page",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.limits",
        "kvstore.tiers.base",
        "kvstore.tiers.memory_limit",
    ),
    # What can be said of a tier by name, beside its settings; the registry knows no tier, only where they are.
    "kvstore.tiers.kind": ("kvstore.config.section", "kvstore.layout", "kvstore.tiers.base"),
    "kvstore.tiers.registry": (
        "kvstore.config.section",
        "kvstore.errors",
        "kvstore.plugins",
        "kvstore.tiers.base",
        "kvstore.tiers.kind",
    ),
    # No tier knows another.
    "kvstore.tiers.disk.kind": (
        "kvstore.codecs.coder",
        "kvstore.config.section",
        "kvstore.config.values",
        "kvstore.tiers.base",
        "kvstore.tiers.disk",
        "kvstore.tiers.kind",
        "kvstore.units",
    ),
    "kvstore.tiers.redis.kind": (
        "kvstore.codecs.coder",
        "kvstore.config.secret",
        "kvstore.config.section",
        "kvstore.config.values",
        "kvstore.tiers.base",
        "kvstore.tiers.kind",
        "kvstore.tiers.redis",
        "kvstore.units",
    ),
    "kvstore.tiers.disk": (
        "kvstore.codecs",
        "kvstore.direction",
        "kvstore.layout",
        "kvstore.page",
        "kvstore.errors",
        "kvstore.ownership",
        "kvstore.tiers.base",
        "kvstore.tiers.disk",
    ),
    "kvstore.tiers.redis": (
        "kvstore.direction",
        "kvstore.page",
        "kvstore.codecs",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.tiers.base",
        "kvstore.tiers.redis",
        "kvstore.units",
    ),
    "kvstore.testing.pages": ("kvstore.page", "kvstore.tiers.base"),
    "kvstore.testing.contracts": (
        "eviction.policy",
        "eviction.ttl",  # makes up for what a policy lacks, as in a planner
        "kvstore.codecs",
        "kvstore.devices",
        "kvstore.errors",
        "kvstore.page",
        "kvstore.testing",
        "kvstore.tiers.base",
    ),
    "kvstore.testing": ("kvstore.errors", "kvstore.ports", "kvstore.testing"),
    "kvstore.logs": (),
    "kvstore.console": (),
    "kvstore.requests": ("kvstore.base", "kvstore.codecs.loss", "kvstore.errors", "kvstore.plan.records", "radix"),
    # The daemon's floors: protocol, then client and daemon, which do not know each other, HTTP, dashboard.
    "kvstore.service.protocol": (
        "kvstore.errors",
        "kvstore.hints",
        "kvstore.layout",
        "kvstore.plan.journal",
        "kvstore.plan.records",
        "kvstore.plan.wishes",
        "kvstore.requests",
        "kvstore.service.protocol",
        "radix",
    ),
    "kvstore.service.client": (
        "kvstore.base",
        "kvstore.codecs.loss",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.hinting",
        "kvstore.hints",
        "kvstore.layout",
        "kvstore.plan.journal",
        "kvstore.plan.records",
        "kvstore.requests",
        "kvstore.service.client",
        "kvstore.service.protocol",
        "kvstore.tiers.host",
        "kvstore.waits",
        "radix",
    ),
    "kvstore.service.client.connect": (
        "kvstore.config",
        "kvstore.errors",
        "kvstore.layout",
        "kvstore.service.client",
        "radix.namespace",
    ),
    "kvstore.service.daemon": (
        "kvstore.build",
        "kvstore.codecs.loss",
        "kvstore.clock",
        "kvstore.config.sections",
        "kvstore.errors",
        "kvstore.layout",
        "kvstore.logs",
        "kvstore.ownership",
        "kvstore.plan",
        "kvstore.requests",
        "kvstore.service.daemon",
        "kvstore.service.protocol",
        "kvstore.store",
        "kvstore.tiers",
        "kvstore.units",
        "kvstore.web",
        "radix",
    ),
    # What puts the process together knows its parts.
    "kvstore.service.daemon.daemon": (
        "kvstore.config.sections",
        "kvstore.errors",
        "kvstore.logs",
        "kvstore.service.daemon",
        "kvstore.service.dashboard",
        "kvstore.service.http",
        "kvstore.web",
    ),
    "kvstore.beliefs": ("eviction.policy",),
    "kvstore.service.http": (
        "eviction.policy",
        "kvstore.admin",
        "kvstore.beliefs",
        "kvstore.codecs.loss",
        "kvstore.build",
        "kvstore.config.sections",
        "kvstore.errors",
        "kvstore.hinting",
        "kvstore.hints",
        "kvstore.logs",
        "kvstore.metrics",
        "kvstore.ownership",
        "kvstore.plan.records",
        "kvstore.requests",
        "kvstore.service.daemon",
        "kvstore.service.http",
        "kvstore.service.protocol",
        "kvstore.tiers.registry",
        "kvstore.web",
        "radix",
    ),
    "kvstore.service.dashboard": (
        "kvstore.admin",
        "kvstore.errors",
        "kvstore.plan.state",
        "kvstore.plan.prefixes",
        "kvstore.plan.records",
        "kvstore.service.client.connection",
        "kvstore.service.daemon",
        "kvstore.service.dashboard",
        "kvstore.service.http",
        "kvstore.tiers.registry",
    ),
    # No program of ours knows another, but the command line, which starts them all.
    "kvstore.demo": (
        "connectors",
        "kvstore.config.sections",
        "kvstore.console",
        "kvstore.demo",
        "kvstore.errors",
        "kvstore.extras",
        "kvstore.limits",
        "kvstore.palette",
        "kvstore.testing",
        "kvstore.units",
    ),
    "kvstore.llamacpp": (
        "connectors",
        "kvstore.base",
        "kvstore.cluster",  # its web answers, errors and streams are OpenAI's
        "kvstore.config",
        "kvstore.errors",
        "kvstore.llamacpp",
        "kvstore.logs",
        "kvstore.metrics",
        "kvstore.tiers.registry",
        "kvstore.web",
    ),
    "kvstore.vllm": (
        "kvstore.cluster",  # its web answers, errors and streams are OpenAI's
        "kvstore.config.sources",
        "kvstore.errors",
        "kvstore.logs",
        "kvstore.metrics",
        "kvstore.vllm",
        "kvstore.web",
    ),
    "kvstore.llamacpp.child": (),  # a process of its own, which loads nothing of ours
    "kvstore.cluster.become": (),  # a process of its own, which loads nothing of ours
    "kvstore.cluster": (
        "connectors",
        "kvstore.base",
        "kvstore.cluster",
        "kvstore.config",
        "kvstore.errors",
        "kvstore.extras",
        "kvstore.logs",
        "kvstore.metrics",
        "kvstore.plan.records",
        "kvstore.prefix",
        "kvstore.requests",
        "kvstore.service.protocol.frames",
        "kvstore.testing",
        "kvstore.tiers.registry",
        "kvstore.web",
    ),
    # Texts and tokens: knows no store.
    "kvstore.prefix": ("kvstore.errors", "kvstore.extras", "kvstore.prefix", "radix"),
    "kvstore.prefix.child": (),  # a process of its own, which loads nothing of ours
    "kvstore.devices": ("kvstore.layout", "kvstore.page", "kvstore.codecs", "kvstore.errors", "kvstore.devices"),
    "kvstore.extras": ("kvstore.errors",),
    "kvstore.palette": (),
    "kvstore.progress": (),
    "kvstore.ports": (),
    "kvstore.web": ("kvstore.logs", "kvstore.web"),  # any server of ours; knows none of them
    # Knows HTTP, nothing of what serves.
    "kvstore.load": (
        "kvstore.errors",
        "kvstore.extras",
        "kvstore.load",
        "kvstore.palette",
        "kvstore.progress",
        "kvstore.units",
        "kvstore.web.sse",
    ),
    "kvstore.recording": ("kvstore.plan.ended",),
    "kvstore.move.recorder": (  # of what the planner tells, it makes lines
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.move.threads",
        "kvstore.plan.ended",
        "kvstore.recording",
    ),
    "kvstore.learned": ("eviction", "kvstore.errors", "kvstore.tiers.disk.private_files"),
    "kvstore.move.learned_writer": ("kvstore.forks", "kvstore.learned", "kvstore.move.threads"),
    "kvstore.move": (
        "kvstore.tiers.base",
        "kvstore.tiers.host",  # what lanes read into for rows of an engine is made as the slab is
        "kvstore.plan.records",
        "kvstore.direction",
        "kvstore.errors",
        "kvstore.limits",  # what a container lets it have of threads
        "kvstore.forks",
        "kvstore.page",
        "kvstore.move",
    ),
    # The face, and what is opened by configuration; no room behind them.
    "connectors": (
        "kvstore.base",
        "kvstore.opening",
        "kvstore.prefix",  # how a tokenizer renders, and which answers its template keeps
        "kvstore.requests",  # what a request's options may be
        "kvstore.layout",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.devices",
        "kvstore.tiers.kind",  # which tiers there are, in an engine's words
        "kvstore.tiers.registry",
        "kvstore.move.worker",  # a thread that copies
        "kvstore.config.sections",
        "radix.namespace",  # the values of the store's face: a connector knows what makes its pages different,
        "radix.tokens",  # and takes tokens as the store does
        "connectors",
    ),
    # An engine that owns its host memory has no store: it moves pages itself, and names them.
    "connectors.vllm_tier": (
        "connectors",
        "kvstore.base",
        "kvstore.build",
        "kvstore.config.sections",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.hints",  # read here, for there is no store that does it
        "kvstore.layout",
        "kvstore.move.rows",
        "kvstore.page",
        "kvstore.plan.records",
        "kvstore.tiers.registry",
        "radix.namespace",
    ),
    "connectors.sglang": (
        "connectors",
        "kvstore.build",
        "kvstore.config.sections",
        "kvstore.errors",
        "kvstore.forks",
        "kvstore.layout",
        "kvstore.move.exchange",
        "kvstore.page",
        "kvstore.tiers.base",
        "kvstore.tiers.registry",
        "radix.namespace",
    ),
}
# Only the face's own users: the laboratory plays whole models, everything else is below the connectors.
CONNECTORS_USERS = (
    "connectors",
    "kvstore.demo",
    "kvstore.cluster",
    "kvstore.llamacpp",
    "kvstore.lab.workloads.model",
    "kvstore.lab.quality",
)

# module from outside -> where it may be imported at all
ONLY_IN: dict[str, tuple[str, ...]] = {
    "asyncio": (
        "kvstore.aio",
        "kvstore.web",
        "kvstore.service",
        "kvstore.cluster",
        "kvstore.llamacpp",
        "kvstore.vllm",
        "kvstore.load",
    ),
    "aiohttp": (
        "kvstore.web",
        "kvstore.service",
        "kvstore.cluster",
        "kvstore.llamacpp",
        "kvstore.vllm",
        "kvstore.load",
    ),
    # codec: storage per thread; service: a client's locks and errands, for the daemon itself has one thread;
    # vllm_layers: events, for a layer that waits for its copy; transformers_ropes: forwards that take turns
    "threading": (
        "kvstore.clock",  # many stores look at one clock
        "kvstore.move",
        "kvstore.dispatcher",
        "kvstore.tiers",
        "kvstore.codecs",
        "kvstore.service",
        "kvstore.testing.contracts",  # threads at once are part of what is promised
        "connectors.vllm.layers",
        "connectors.transformers.ropes",
    ),
    # workloads stand in for a lane; a replica computes on one thread beside its event loop
    "concurrent": ("kvstore.move", "kvstore.tiers", "kvstore.lab.workloads", "kvstore.cluster"),
    "transformers": (
        "connectors",
        "kvstore.demo",
        "kvstore.lab.workloads.model",
        "kvstore.lab.quality",
        "kvstore.prefix.template",
        "kvstore.lab.traces.prompts",
    ),
    "vllm": ("connectors",),
    "sglang": ("connectors",),
    "xllamacpp": ("kvstore.llamacpp.child",),  # a process of its own
    "pytest": ("kvstore.testing.contracts",),  # of what is installed, nothing else needs them
    "hypothesis": ("kvstore.testing.contracts",),
    "torch": ("connectors", "kvstore.demo", "kvstore.lab", "kvstore.devices"),
    "msgspec": ("kvstore.hints", "kvstore.service.protocol", "kvstore.lab.traces.event_log"),
    "zmq": ("kvstore.lab.traces.event_recorder",),
}
# module from outside -> imported inside functions only, so that importing our packages stays cheap and engines optional
LAZY = ("torch", "transformers", "vllm", "sglang", "xllamacpp", "triton", "matplotlib", "gguf", "zmq")
LAZY_EXCEPT = (
    "connectors.transformers",
    "connectors.vllm",
    "connectors.vllm_tier",
    "connectors.sglang",
    "connectors.sglang_linker",
    "kvstore.demo",
)


@dataclass(frozen=True)
class Import:
    """`module` imports `target` in `line`; `at_top` if importing the module does it."""

    module: str
    target: str
    line: int
    at_top: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def find_modules(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Module name -> file."""
    modules = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(modules: Mapping[str, Path]) -> list[Import]:
    """Every import statement of every module, resolved to the module it loads."""
    found: list[Import] = []
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        late = _inside(tree, lambda node: isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        late |= _inside(tree, _is_type_checking)
        found += dict.fromkeys(
            Import(module, target, node.lineno, node not in late)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for target in _targets(node, module, path, modules)
        )
    return found


def direction_violations(imports: list[Import], modules: Mapping[str, Path]) -> list[str]:
    """Imports of ours that the rules do not allow."""
    bad = []
    for item in imports:
        if item.target not in modules:
            continue
        rule = max((prefix for prefix in MAY_IMPORT if _under(item.module, prefix)), key=len, default=None)
        allowed = rule is None or any(_under(item.target, prefix) for prefix in MAY_IMPORT[rule])
        if _under(item.target, "connectors"):
            allowed = any(_under(item.module, prefix) for prefix in CONNECTORS_USERS)
        if not allowed:
            bad.append(str(item))
    return bad


def place_violations(imports: list[Import]) -> list[str]:
    """Modules from outside that are imported where they do not belong, or too early."""
    bad = []
    for item in imports:
        outside = item.target.partition(".")[0]
        if outside in ONLY_IN and not any(_under(item.module, place) for place in ONLY_IN[outside]):
            bad.append(f"{item}; only {', '.join(ONLY_IN[outside])} may")
        if outside in LAZY and item.at_top and not any(_under(item.module, place) for place in LAZY_EXCEPT):
            bad.append(f"{item} at the top; it must be inside a function")
    return bad


def cycles(imports: list[Import], modules: Mapping[str, Path]) -> list[list[str]]:
    """Import circles, each as the list of modules along it. Imports for the type checker count."""
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for item in imports:
        if item.target in modules and item.target != item.module:
            edges[item.module].add(item.target)
    found: list[list[str]] = []
    finished: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(edges[module]):
                walk(target, [*trail, module])
            finished.add(module)

    for module in edges:
        walk(module, [])
    return found


def _targets(node: ast.Import | ast.ImportFrom, module: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    for alias in node.names:
        # `from kvstore.plan import records` loads a module, `from kvstore.plan.records import Match` does not.
        full = f"{base}.{alias.name}"
        yield full if full in modules else base


def _under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _inside(tree: ast.AST, wanted: Callable[[ast.AST], bool]) -> set[ast.AST]:
    return {inner for outer in ast.walk(tree) if wanted(outer) for inner in ast.walk(outer)}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


# ---- the repository -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> tuple[dict[str, Path], list[Import]]:
    modules = find_modules(ROOT)
    return modules, find_imports(modules)


def test_every_package_is_looked_at(ours: tuple[dict[str, Path], list[Import]]) -> None:
    modules, imports = ours

    assert set(PACKAGES) <= set(modules)
    assert any(item.target == "kvstore.errors" for item in imports)


def test_imports_point_downwards_only(ours: tuple[dict[str, Path], list[Import]]) -> None:
    modules, imports = ours

    assert direction_violations(imports, modules) == []


def test_threads_loops_and_engines_stay_in_their_rooms(ours: tuple[dict[str, Path], list[Import]]) -> None:
    _, imports = ours

    assert place_violations(imports) == []


def test_there_is_no_import_circle_names_for_the_type_checker_included(
    ours: tuple[dict[str, Path], list[Import]],
) -> None:
    modules, imports = ours

    assert cycles(imports, modules) == []


# ---- the checker itself ---------------------------------------------------------------------------------------------


def check(root: Path, files: dict[str, str]) -> tuple[dict[str, Path], list[Import]]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    modules = find_modules(root)
    return modules, find_imports(modules)


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("radix/tree.py", "import kvstore.page", "radix.tree:1 imports kvstore.page"),
        ("radix/tree.py", "def f():\n    from kvstore import page", "radix.tree:2 imports kvstore.page"),
        ("kvstore/plan/a.py", "from ..tiers import base", "kvstore.plan.a:1 imports kvstore.tiers.base"),
        (
            "kvstore/tiers/disk/tier.py",
            "from kvstore.plan.records import X",
            "kvstore.tiers.disk.tier:1 imports kvstore.plan.records",
        ),
        ("kvstore/store.py", "import connectors", "kvstore.store:1 imports connectors"),
        (
            "connectors/vllm/worker.py",
            "from kvstore.plan import planner",
            "connectors.vllm.worker:1 imports kvstore.plan.planner",
        ),
    ],
)
def test_checker_sees_an_import_that_points_upwards(tmp_path: Path, file: str, source: str, told: str) -> None:
    modules, imports = check(
        tmp_path,
        {
            "kvstore/page.py": "",
            "kvstore/tiers/base.py": "",
            "kvstore/plan/records.py": "",
            "kvstore/plan/planner.py": "",
            "connectors/__init__.py": "",
            file: source,
        },
    )

    assert direction_violations(imports, modules) == [told]


def test_checker_allows_what_the_rules_allow(tmp_path: Path) -> None:
    modules, imports = check(
        tmp_path,
        {
            "radix/tree.py": "",
            "kvstore/errors.py": "",
            "kvstore/plan/planner.py": "import radix.tree\nfrom kvstore.errors import KVStoreError",
            "kvstore/demo/script.py": "import connectors.base",
            "connectors/base.py": "import kvstore.errors",
        },
    )

    assert direction_violations(imports, modules) == []
    assert place_violations(imports) == []
    assert cycles(imports, modules) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kvstore/store.py", "import asyncio"),
        ("kvstore/plan/planner.py", "from threading import Lock"),
        ("kvstore/tiers/disk/tier.py", "import asyncio.locks"),
        ("kvstore/build.py", "def f():\n    import vllm"),
        ("kvstore/devices/cuda.py", "import torch"),
    ],
)
def test_checker_sees_a_module_out_of_its_room(tmp_path: Path, file: str, source: str) -> None:
    _, imports = check(tmp_path, {file: source})

    assert len(place_violations(imports)) == 1


def test_checker_lets_optional_modules_be_imported_late(tmp_path: Path) -> None:
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    _, imports = check(tmp_path, {"kvstore/devices/cuda.py": late})

    assert place_violations(imports) == []


def test_checker_sees_a_circle_through_a_late_import(tmp_path: Path) -> None:
    modules, imports = check(
        tmp_path,
        {
            "kvstore/a.py": "import kvstore.b",
            "kvstore/b.py": "from kvstore import c",
            "kvstore/c.py": "def f():\n    from kvstore.a import x",
        },
    )

    assert cycles(imports, modules) == [["kvstore.a", "kvstore.b", "kvstore.c", "kvstore.a"]]


def test_checker_sees_a_circle_through_names_for_the_type_checker(tmp_path: Path) -> None:
    modules, imports = check(
        tmp_path,
        {
            "kvstore/a.py": "import kvstore.b",
            "kvstore/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kvstore.a",
        },
    )

    assert cycles(imports, modules) == [["kvstore.a", "kvstore.b", "kvstore.a"]]
