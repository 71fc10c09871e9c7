"""The rules of the house, read off the sources: imports, sizes, paths; --help tells the truth."""

import ast
import graphlib
import importlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import EXPERIMENTS
from hope_jax.cli import COMMANDS
from hope_jax.cli.main import main
from hope_jax.cli.parse import _flags

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for top in ("hope_jax", "experiments") for p in (ROOT / top).rglob("*.py"))
EVERYTHING = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *EVERYTHING])

# A part imports parts of earlier rows, and itself. `hope_jax` is the front door: it collects public names.
RANKS = [
    {"errors", "types", "signals", "levels", "kept", "config"},
    {"memory", "optim", "data", "storage"},
    {"nn"},
    {"models"},
    {"context", "train", "interop"},
    {"generate", "sampling", "trace", "stacking", "evals"},
    {"hope_jax"},
    {"cli", "__main__"},
    {"experiments"},
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
STRANGERS = {"memory", "optim", "data", "storage"}  # none of these imports another


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


def _against_the_layers(module: str, other: str) -> bool:
    """Whether ``module`` may not import ``other``: it stands above, or both are strangers."""
    mine, theirs = part_of(module), part_of(other)
    return RANK[theirs] > RANK[mine] or (theirs != mine and {theirs, mine} <= STRANGERS)


def test_imports_point_down_the_layers_and_strangers_do_not_meet():
    wrong = [f"{a} imports {b}" for a, others in GRAPH.items() for b in sorted(others) if _against_the_layers(a, b)]
    assert not wrong


def test_no_import_cycles():
    edges = {m: others - {m} for m, others in GRAPH.items()}
    assert set(graphlib.TopologicalSorter(edges).static_order()) == MODULES.keys()


def _run_without_a_backend(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_importing_does_no_work():
    """Every module imports, silently, where any array computation fails because there is no device at all."""
    names = [m for m in MODULES if not m.endswith("__main__")]
    importing = f"import importlib\nfor m in {names}: importlib.import_module(m)\nprint('imported')"
    done = _run_without_a_backend(f"{importing}\nimport jax.numpy as jnp; jnp.zeros(3)")
    assert done.stdout == "imported\n"
    assert done.returncode != 0 and done.stderr.startswith("Traceback") and "backend" in done.stderr


# ---------------------------------------------------------------- sizes and text of the files

Function = ast.FunctionDef | ast.AsyncFunctionDef
TEXTS = {p: p.read_text() for p in DOCUMENTS}


def functions_of(path: Path) -> list[Function]:
    """Every function and method of a file, the inner ones too."""
    return [node for node in ast.walk(ast.parse(TEXTS[path])) if isinstance(node, Function)]


def lines_of(node: Function | ast.stmt) -> int:
    """Lines from the first to the last, without decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def code_lines(function: Function) -> int:
    """Lines of a function but for its docstring."""
    described = ast.get_docstring(function) is not None
    return lines_of(function) - (lines_of(function.body[0]) if described else 0)


def too_long(paths: list[Path], limit: int) -> dict[str, int]:
    """Files of more than ``limit`` lines."""
    counts = {str(p.relative_to(ROOT)): len(TEXTS[p].splitlines()) for p in paths}
    return {path: count for path, count in counts.items() if count > limit}


def test_files_stay_short():
    assert not too_long(SOURCES, 250)
    assert not too_long(EVERYTHING, 299)


def test_experiments_stay_small():
    lengths = [len(TEXTS[path].splitlines()) for path in SOURCES if path.is_relative_to(ROOT / "experiments")]
    assert 0 < sum(lengths) <= 2200


def test_a_function_with_a_name_is_a_def():
    assert not [path for path in EVERYTHING if "noqa: " + "E731" in TEXTS[path]]


def test_no_function_is_long():
    lengths = [(lines_of(f), f.name, str(p.relative_to(ROOT))) for p in EVERYTHING for f in functions_of(p)]
    assert not [found for found in lengths if found[0] >= 60]


def test_most_functions_of_the_source_are_very_short():
    lengths = [code_lines(f) for path in SOURCES for f in functions_of(path)]
    assert statistics.median(lengths) <= 6
    assert statistics.quantiles(lengths, n=10)[-1] <= 20


def test_every_file_says_what_it_is():
    assert not [p for p in EVERYTHING if not ast.get_docstring(ast.parse(TEXTS[p]))]


def test_documents_name_no_machine_paths():
    machine = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|opt|mnt)/\S*")
    assert not {(p, found) for p in DOCUMENTS for found in machine.findall(TEXTS[p])}


# ---------------------------------------------------------------- the README and the command line


def test_an_unknown_command_is_answered_with_the_closest_name(capsys):
    assert main(["pretrian"]) == 2
    assert "no command 'pretrian'; did you mean 'pretrain'" in capsys.readouterr().err


@pytest.mark.parametrize(("program", "table"), [("hope_jax", COMMANDS), ("experiments", EXPERIMENTS)])
def test_the_list_of_a_program_appears_without_importing_jax(program, table):
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('{program}', run_name='__main__')\n"
    code += "except SystemExit: sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in table:
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3


@pytest.mark.parametrize(("name", "target"), (COMMANDS | EXPERIMENTS).items())
def test_the_help_explains_every_flag_that_can_be_given(name, target, capsys):
    module = importlib.import_module(target.split(":")[0])
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    flags = [flag for flag, _ in _flags(getattr(module, f"{name.title().replace('_', '')}Config"))]
    assert len(flags) == len(set(flags)) >= 5
    for flag in flags:
        assert re.search(rf"{flag}[ ,]", shown), flag


def test_the_help_shows_the_words_written_below_the_fields(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "Sequences per batch, of all",
        "Peak learning rate, reached after",
        "Path of a JSON file",
    ):
        assert words in shown
