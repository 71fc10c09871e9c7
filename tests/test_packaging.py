"""What an installation brings: the core works without the extras, and a missing extra is one sentence that names it."""

import ast
import configparser
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from hope_jax.errors import MissingExtra, UserError, extra

ROOT = Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")

# A Python in which every package of the extras is missing, whatever is installed.
WITHOUT_EXTRAS = """
import contextlib, io, json, sys
for name in {hidden}:
    sys.modules[name] = None
import hope_jax
quick = "jax" not in sys.modules
from hope_jax.cli.main import main
from hope_jax.errors import UserError

def said(call):
    try:
        call()
    except UserError as error:
        return str(error)

def status(arguments):
    with contextlib.redirect_stderr(io.StringIO()) as text:
        return main(arguments), text.getvalue()

listed = main(["--help"])
names = [hope_jax.optim.m3, hope_jax.context.learn, hope_jax.generate.sample, hope_jax.trace.watch]
names += [hope_jax.memory.gated_delta, hope_jax.MODELS, hope_jax.config.to_json]
import importlib
missing = {{name: said(lambda: importlib.import_module(name)) for name in {doors}}}
json.dump([quick, listed, missing, status(["pretrain"])], sys.stderr)
"""
DOORS = ["hope_jax.train", "hope_jax.data", "hope_jax.train.loop", "hope_jax.interop.llama"]


def requirements(names: str) -> set[str]:
    """Names of the distributions in a list of requirements, without those of other extras of ours."""
    found = (line.strip().partition(">")[0].partition("[")[0] for line in names.splitlines() if line.strip())
    return {name.lower().replace("_", "-") for name in found} - {"hope-jax"}


CORE = requirements(SETUP["options"]["install_requires"])
EXTRAS = {name: requirements(listed) for name, listed in SETUP["options.extras_require"].items()}


def imported(path: Path) -> set[str]:
    """Top-level packages that a source imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"hope_jax", "experiments"}


@pytest.mark.parametrize(("folder", "extras"), [("hope_jax", ["train"]), ("experiments", ["train", "experiments"])])
def test_every_package_that_is_imported_is_declared(folder, extras):
    declared = CORE.union(*(EXTRAS[name] for name in extras))
    # orbax and google are folders that several distributions share.
    of = dict(packages_distributions()) | {"orbax": ["orbax-checkpoint"], "google": ["tensorflow-datasets"]}
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            owners = {owner.lower().replace("_", "-") for owner in of[name]}
            assert owners & declared, f"{path} imports {name}, which setup.cfg does not bring"


@pytest.fixture(scope="module")
def without_extras():
    """``(import was quick, status of the list, sentence of every door, status and sentence of pretrain)``."""
    optional = {name.lower() for listed in ("train", "experiments") for name in EXTRAS[listed]}
    owners = packages_distributions()
    hidden = [name for name, of in owners.items() if optional & {owner.lower().replace("_", "-") for owner in of}]
    code = WITHOUT_EXTRAS.format(hidden=[name for name in hidden if name.isidentifier()], doors=DOORS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_the_core_works_without_any_extra_and_its_import_is_quick(without_extras):
    quick, listed, _, _ = without_extras
    assert quick and listed == 0


def test_a_missing_extra_is_one_sentence_that_names_it(without_extras):
    _, _, missing, (status, sentence) = without_extras
    for said in [*missing.values(), sentence]:
        assert said and "pip install 'hope_jax[train]'" in said and "\n" not in said.strip(), said
    assert status == 2


def test_a_mistake_of_ours_is_not_taken_for_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="hope_jax.no_such"), extra("train"):
        raise ModuleNotFoundError("No module named 'hope_jax.no_such'", name="hope_jax.no_such")
    with pytest.raises(MissingExtra, match=r"'tyro' .*hope_jax\[train\]") as caught, extra("train"):
        raise ModuleNotFoundError("No module named 'tyro.conf'", name="tyro.conf")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ImportError)
