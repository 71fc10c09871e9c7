"""The rules of the house, read off the sources: who may import whom, no work at import, sizes, no machine paths."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for top in ("hope_jax", "experiments") for p in (ROOT / top).rglob("*.py"))
EVERYTHING = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *EVERYTHING])

# A part imports parts of earlier rows, and itself. `hope_jax` is the front door: it collects public names.
RANKS = [
    {"errors", "types", "levels"},
    {"memory", "optim", "data"},
    {"nn"},
    {"models", "context"},
    {"train", "generate"},
    {"evals"},
    {"hope_jax"},
    {"experiments"},
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
STRANGERS = {"memory", "optim", "data"}  # none of these imports another


def module_name(path: Path) -> str:
    """``hope_jax/nn/layers.py`` -> ``hope_jax.nn.layers``; a package's ``__init__`` has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for p in SOURCES}


def part_of(module: str) -> str:
    """The entry of RANKS a module belongs to: ``hope_jax.nn.layers`` -> ``nn``."""
    top, *rest = module.split(".")
    return rest[0] if top == "hope_jax" and rest else top


def imports_of(path: Path) -> set[str]:
    """Names of our own modules that ``path`` imports, anywhere in the file."""
    assert "from ." not in path.read_text(), f"{path}: write the full module name"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found & MODULES.keys()


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def test_every_module_is_on_the_map():
    unknown = {m for m in MODULES if part_of(m) not in RANK}
    assert not unknown, f"not in RANKS of this test nor in the layout of the design: {unknown}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_layers(module):
    mine = part_of(module)
    for other in map(part_of, GRAPH[module]):
        assert RANK[other] <= RANK[mine], f"{module} imports {other}, which stands above it"
        assert other == mine or not {other, mine} <= STRANGERS, f"{module} and {other} must not know each other"


def test_no_import_cycles():
    edges = {m: others - {m} for m, others in GRAPH.items()}
    assert set(graphlib.TopologicalSorter(edges).static_order()) == MODULES.keys()


def _run_without_a_backend(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_importing_does_no_work():
    """Every module imports, silently, where any array computation fails because there is no device at all."""
    names = [m for m in MODULES if not m.endswith("__main__")]
    done = _run_without_a_backend(f"import importlib\nfor m in {names}: importlib.import_module(m)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert _run_without_a_backend("import jax.numpy as jnp; jnp.zeros(3)").returncode != 0


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines < 60, f"{path.name}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_no_machine_paths(path):
    found = re.findall(r"(?<![\w.:/-])/(?:home|Users|root|work|opt|mnt)/\S*", path.read_text())
    assert not found
