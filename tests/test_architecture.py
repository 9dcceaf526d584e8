"""The rules of the house, read off the syntax tree; each is proved by a planted violation."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

__all__: list[str] = []

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
HEAVY = {"arviz", "matplotlib", "pandas", "polars", "pyarrow", "sklearn", "xarray"}
NO_PICKLE = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
RUNS_CODE = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
GLOBAL_GENERATORS = (
    "torch.manual_seed",
    "torch.seed",
    "torch.set_rng_state",
    "torch.random.",
    "torch.cuda.manual_seed",
    "torch.cuda.set_rng_state",
    "torch.default_generator",
    "pyro.set_rng_seed",
    "pyro.util.set_rng_",
    "numpy.random.seed",
    "random.",
)
# Which other rooms each room may not import; a wing never sees the other one.
FORBIDDEN = {
    "core": ("models", "inference", "app"),
    "models": ("inference", "app"),
    "inference": ("models", "app"),
    "app": (),
}


class Module(NamedTuple):
    """One source file: where it lies, which room it belongs to, and its syntax tree."""

    path: str
    room: str
    source: str
    tree: ast.Module


def modules(root: Path) -> Iterator[Module]:
    """Every module of the library once: the wings by their own folders, not through the links."""
    for folder in ("bayesgen", "models", "inference"):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            if folder == "bayesgen" and relative.parts[1] in ("models", "inference"):
                continue  # Python 3.11 and 3.12 follow links in rglob, 3.13 does not
            below = relative.parts[1] if folder == "bayesgen" else folder
            room = below if below in FORBIDDEN else "core"
            source = path.read_text(encoding="utf-8")
            yield Module(relative.as_posix(), room, source, ast.parse(source, str(path)))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, also under TYPE_CHECKING and through ``import_module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            if base == "bayesgen":  # `from bayesgen import models`
                yield from (f"bayesgen.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def used(tree: ast.Module) -> Iterator[str]:
    """Dotted names a module reads, aliases undone: ``t.load`` is ``torch.load``."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                aliases[a.asname or a.name.partition(".")[0]] = (
                    a.name if a.asname else a.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            aliases.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    builtins = {"eval", "exec", "print", "hasattr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = ast.unparse(node).partition(".")
            if head in aliases:
                yield aliases[head] + (f".{rest}" if rest else "")
            elif not rest and head in builtins:
                yield head


def _under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rule_rooms(module: Module) -> Iterator[str]:
    """Core imports no wing and no app, a wing never the other one."""
    for name in imported(module.tree):
        for room in FORBIDDEN[module.room]:
            if _under(name, f"bayesgen.{room}"):
                yield f"{module.room} imports {name}"


def rule_bare(module: Module) -> Iterator[str]:
    """Imports are written ``bayesgen.models...``: never bare, never relative."""
    for name in imported(module.tree):
        if name.startswith(".") or _under(name, "models") or _under(name, "inference"):
            yield f"imports {name}; write bayesgen.{name.lstrip('.')}"


def rule_lines(module: Module) -> Iterator[str]:
    """No file of 600 lines."""
    if (lines := module.source.count("\n")) >= MAX_LINES:
        yield f"{lines} lines: split it"


def rule_opening(module: Module) -> Iterator[str]:
    """A docstring, then imports, then ``__all__``, then the rest."""
    if not ast.get_docstring(module.tree):
        yield "no module docstring"
    for node in module.tree.body[1:]:
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if guard or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if not any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            yield "the first statement after the imports is not __all__"
        return
    yield "no __all__"


def rule_print(module: Module) -> Iterator[str]:
    """Nothing below the app prints."""
    if module.room != "app" and {"print", "sys.stdout"} & set(used(module.tree)):
        yield "prints below the app"


def rule_pickle(module: Module) -> Iterator[str]:
    """No file that is read may run code."""
    for name in imported(module.tree):
        if name.partition(".")[0] in NO_PICKLE:
            yield f"imports {name}"
    for name in set(used(module.tree)) & RUNS_CODE:
        yield f"uses {name}"
    if "allow_pickle=True" in module.source.replace(" ", ""):
        yield "loads numpy files with allow_pickle"


def rule_generators(module: Module) -> Iterator[str]:
    """Only rng.py touches the global generators."""
    if module.path == "bayesgen/rng.py":
        return
    for name in set(used(module.tree)):
        if name.startswith(GLOBAL_GENERATORS):
            yield f"touches a global generator: {name}"


def rule_lazy(module: Module) -> Iterator[str]:
    """Heavy packages are imported inside functions (the app may do as it likes)."""
    if module.room == "app":
        return
    top = [n for n in module.tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    for name in imported(ast.Module(top, [])):
        if name.partition(".")[0] in HEAVY:
            yield f"imports {name} when it is imported itself"


def rule_hasattr(module: Module) -> Iterator[str]:
    """Capabilities are asked for, never sniffed."""
    if "hasattr" in set(used(module.tree)):
        yield "uses hasattr"


Rule = Callable[[Module], Iterator[str]]
RULES: dict[str, Rule] = {
    "rooms": rule_rooms,
    "bare": rule_bare,
    "lines": rule_lines,
    "opening": rule_opening,
    "print": rule_print,
    "pickle": rule_pickle,
    "generators": rule_generators,
    "lazy": rule_lazy,
    "hasattr": rule_hasattr,
}


def violations(root: Path, rule: str) -> list[str]:
    """What breaks a rule under ``root``, as ``path: what``."""
    return [f"{m.path}: {what}" for m in modules(root) for what in RULES[rule](m)]


@pytest.mark.parametrize("rule", RULES)
def test_the_library_keeps(rule: str):
    assert violations(ROOT, rule) == []


def test_the_scan_sees_the_library():
    rooms = {module.room for module in modules(ROOT)}
    assert {"core", "models", "inference"} <= rooms
    paths = [module.path for module in modules(ROOT)]
    assert "bayesgen/capabilities.py" in paths
    assert not [p for p in paths if p.startswith(("bayesgen/models", "bayesgen/inference"))]


def test_no_test_or_benchmark_is_long_either():
    files = [p for d in ("tests", "benchmarks", "docs") for p in (ROOT / d).rglob("*.py")]
    long = [str(p) for p in files if p.read_text("utf-8").count("\n") >= MAX_LINES]
    assert not long


# ------------------------------------------------------------------ planted violations
CLEAN = '"""A module."""\n\nfrom __future__ import annotations\n\n__all__: list[str] = []\n'
CORE, APP, ENGINE, MODEL = "bayesgen/x.py", "bayesgen/app/x.py", "inference/x.py", "models/a/x.py"
PLANTED = [
    ("rooms", CORE, "from bayesgen.models import GaussianMixture"),
    ("rooms", CORE, "from bayesgen import inference"),
    ("rooms", CORE, "import bayesgen.app.cli"),
    ("rooms", "bayesgen/deep/x.py", "def f():\n    import bayesgen.models.mixture as m"),
    ("rooms", CORE, "if TYPE_CHECKING:\n    from bayesgen.inference.vb import VB"),
    ("rooms", CORE, "m = importlib.import_module('bayesgen.models.mixture')"),
    ("rooms", MODEL, "from bayesgen.inference import EM"),
    ("rooms", MODEL, "from bayesgen.app import cli"),
    ("rooms", ENGINE, "from bayesgen.models.mixture import Mixture"),
    ("rooms", ENGINE, "from bayesgen import app"),
    ("bare", CORE, "from models.mixture import Mixture"),
    ("bare", APP, "import inference"),
    ("bare", MODEL, "from . import mixture"),
    ("lines", CORE, "\n" * MAX_LINES),
    ("print", ENGINE, "print('step')"),
    ("print", CORE, "import sys\nsys.stdout.write('step')"),
    ("pickle", CORE, "import pickle"),
    ("pickle", CORE, "from cloudpickle import dumps"),
    ("pickle", APP, "import torch as t\nt.load('x')"),
    ("pickle", APP, "from torch import load\nload('x')"),
    ("pickle", MODEL, "import yaml\nyaml.load('x')"),
    ("pickle", CORE, "eval('1')"),
    ("pickle", CORE, "import numpy as np\nnp.load('x', allow_pickle = True)"),
    ("generators", CORE, "import torch\ntorch.manual_seed(0)"),
    ("generators", ENGINE, "import torch\nwith torch.random.fork_rng():\n    pass"),
    ("generators", ENGINE, "from pyro import set_rng_seed as s\ns(0)"),
    ("generators", MODEL, "import numpy as np\nnp.random.seed(0)"),
    ("generators", APP, "import random\nrandom.random()"),
    ("lazy", CORE, "import arviz as az"),
    ("lazy", MODEL, "from sklearn.cluster import KMeans"),
    ("hasattr", CORE, "hasattr(1, 'x')"),
]
ALLOWED = [
    (
        APP,
        "from bayesgen.models import X\nfrom bayesgen.inference import EM\nprint(1)\nimport arviz",
    ),
    ("bayesgen/rng.py", "import torch\ntorch.manual_seed(0)"),
    (MODEL, "from bayesgen.models.families import poisson\nfrom bayesgen.fit import Fit"),
    (CORE, "def f(net):\n    import arviz\n    net.eval()\n    return net.load('x')"),
    (CORE, "if TYPE_CHECKING:\n    import pandas as pd"),
    (ENGINE, "import torch\ng = torch.Generator().manual_seed(0)\ntorch.randn(3, generator=g)"),
]


def plant(root: Path, path: str, source: str) -> None:
    for name in (CORE, APP, ENGINE, MODEL, path):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CLEAN, encoding="utf-8")
    (root / path).write_text(source, encoding="utf-8")


@pytest.mark.parametrize(("rule", "path", "line"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, rule: str, path: str, line: str):
    plant(tmp_path, path, CLEAN + line + "\n")
    found = violations(tmp_path, rule)
    assert found
    assert all(f.startswith(path) for f in found)


@pytest.mark.parametrize(
    "source",
    ["__all__ = []\n", '"""Doc."""\n', '"""Doc."""\nx = 1\n__all__ = []\n', "x = 1\n"],
    ids=["no docstring", "no __all__", "late __all__", "neither"],
)
def test_a_planted_opening_is_found(tmp_path: Path, source: str):
    plant(tmp_path, CORE, source)
    assert violations(tmp_path, "opening")


@pytest.mark.parametrize(("path", "line"), ALLOWED)
def test_what_is_allowed_passes(tmp_path: Path, path: str, line: str):
    plant(tmp_path, path, CLEAN + line + "\n")
    assert [v for rule in RULES for v in violations(tmp_path, rule)] == []


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _, _ in PLANTED} | {"opening"} == set(RULES)


# ------------------------------------------------------------------ documented in public
def public_things() -> Iterator[tuple[str, object]]:
    """Every public class and function, and the classes' public methods, by dotted name."""
    package = importlib.import_module("bayesgen")
    for info in pkgutil.walk_packages(package.__path__, "bayesgen."):
        module = importlib.import_module(info.name)
        for name in module.__all__:
            thing = vars(module).get(name)  # what loads lazily is seen in its own module
            if getattr(thing, "__module__", None) != info.name or not callable(thing):
                continue
            yield f"{info.name}.{name}", thing
            if inspect.isclass(thing):
                yield from methods(f"{info.name}.{name}", thing)


def methods(name: str, cls: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties that a class defines; an override stands for its contract."""
    for attribute, member in vars(cls).items():
        is_property = isinstance(member, property | functools.cached_property)
        if attribute.startswith("_") or not (is_property or inspect.isroutine(member)):
            continue
        versions = [vars(base)[attribute] for base in cls.__mro__ if attribute in vars(base)]
        documented = [v for v in versions if getattr(v, "__func__", v).__doc__]
        yield f"{name}.{attribute}", documented[0] if documented else member


def test_public_things_are_documented():
    things = dict(public_things())
    assert len(things) > 20
    assert [name for name, thing in things.items() if not inspect.getdoc(thing)] == []
