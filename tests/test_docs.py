"""The documents tell the truth: their code runs, their links lead somewhere, and what they name exists."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from documents import ROOT, blocks, run

from experiments import EXPERIMENTS
from experiments.__main__ import main as experiments
from hope_jax import context, memory, optim
from hope_jax.cli import COMMANDS
from hope_jax.cli.main import main
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, MODELS, Size

README = ROOT / "README.md"
GUIDES = ROOT / "docs" / "guides"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
SOURCES = sorted(path for top in ("hope_jax", "experiments") for path in (ROOT / top).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)])


@pytest.fixture
def tiny(monkeypatch):
    """The names of README and guides with models that compile in no time."""
    for architecture in ("hope", "hope_attention"):
        small = ARCHITECTURES[architecture](Size(16, 1, 2, 256, 512, (Level(2048),)))
        monkeypatch.setitem(MODELS, f"{architecture}-tiny", small)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_session_of_the_readme_runs_and_going_on_equals_one_go(tiny):
    names = run(README, blocks(README, "python")[:1])
    whole, _ = names["model"].apply({"params": names["params"]}, names["whole"])
    np.testing.assert_allclose(names["logits"], whole[:, -names["logits"].shape[1] :], atol=1e-4)
    assert names["written"].shape == (1, 8)


def test_the_optimizer_line_of_the_readme_is_m3():
    state = run(README, blocks(README, "python")[1:])["tx"].init({"w": jnp.ones((3, 3))})
    assert _holds(state, optim.M3State)


@pytest.mark.slow
def test_the_document_of_the_guide_is_less_surprising_the_second_time(tiny):
    names = run(GUIDES / "keep_learning.md", blocks(GUIDES / "keep_learning.md", "python"))
    assert names["second"] < 0.95 * names["first"] and names["written"].shape == (1, 8)
    fresh = names["model"].init_state(names["params"], batch=1)
    read = [
        names["model"].apply({"params": names[which]}, names["document"], fresh)[0] for which in ("merged", "params")
    ]
    assert np.abs(read[0] - read[1]).max() > 1e-3


def test_the_swapped_optimizer_of_the_guide_learns_and_is_m3(tiny):
    first, second, third = blocks(GUIDES / "swap_the_optimizer.md", "python")
    names = run(GUIDES / "swap_the_optimizer.md", [first])
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    assert _holds(names["state"], optim.M3State)
    assert _holds(run(README, [second])["tx"].init({"blocks": {"w": jnp.ones((2, 3, 3))}}), optim.M3State)
    names = run(README, [third])
    params = jax.eval_shape(names["model"].init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    assert _holds(jax.eval_shape(names["tx"].init, params), optim.M3State)


def test_the_rule_of_the_guide_is_its_reference():
    *codes, model = blocks(GUIDES / "add_a_memory_rule.md", "python")
    names = run(GUIDES / "add_a_memory_rule.md", codes)
    np.testing.assert_allclose(names["reads"], names["expected"], atol=1e-9)
    assert "LanguageModel" in model


def test_the_experiment_of_the_guide_learns():
    names = run(GUIDES / "add_an_experiment.md", blocks(GUIDES / "add_an_experiment.md", "python"))
    assert names["result"].heldout[200]["accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["add_a_memory_rule", "add_a_model"])
def test_the_model_of_the_guide_runs(guide):
    names = run(GUIDES / f"{guide}.md", blocks(GUIDES / f"{guide}.md", "python"))
    assert np.isfinite(names["logits"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(notebook):
    matplotlib.use("agg")
    cells = blocks(notebook, "{code-cell} ipython3")
    assert len(cells) > 4
    run(notebook, cells)


def test_links_lead_to_files():
    broken = []
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        links = [f"{name}.md" for name in re.findall(r"\{doc\}`([^`]+)`", prose)]
        links += re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", prose))
        broken += [f"{page}: {link}" for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_pages_name_only_files_functions_and_tests_that_exist():
    wrong = []
    for page in PAGES:
        text = page.read_text()
        paths = set(re.findall(r"`((?:hope_jax|experiments|tests)/[\w/]+\.py)", text))
        wrong += [f"{page}: {path}" for path in paths if not (ROOT / path).exists()]
        for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
            defined = re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(), flags=re.MULTILINE)
            wrong += [] if defined else [f"{page}: {path}::{name}"]
    assert not wrong


def test_every_row_of_the_equations_names_a_function_and_a_test():
    rows = [line for line in (ROOT / "docs" / "equations.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        assert re.search(r"`hope_jax/[\w/]+\.py(::\w+)?` \| `tests/\w+\.py::\w+` \|$", row), row


def test_pages_name_only_public_functions_that_exist():
    text = "\n".join(path.read_text() for path in PAGES if path.name != "CHANGELOG.md")
    for package, name in (("optim", optim), ("context", context), ("memory", memory)):
        for function in set(re.findall(rf"`(?:hope_jax\.)?{package}\.(\w+)[`(]", text)) - {"md"}:
            assert hasattr(name, function), f"{package}.{function}"


def _holds(state, kind) -> bool:
    return any(isinstance(part, kind) for part in jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kind)))


PROGRAMS = {r"(?:hope-jax|python -m hope_jax)": (COMMANDS, main), "python -m experiments": (EXPERIMENTS, experiments)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_of_the_documents_and_docstrings_exist(program, capsys):
    """Every ``--flag`` of a command line that they show is one that the command knows."""
    (table, start), known = PROGRAMS[program], {}
    for line in _command_lines(program):
        name, *rest = line.split()
        if name not in table:
            continue
        if name not in known:
            with pytest.raises(SystemExit):
                start([name, "--help"])
            known[name] = capsys.readouterr().out
        for flag in re.findall(r"(--[\w.-]+)", " ".join(rest)):
            assert flag == "--help" or re.search(rf"{re.escape(flag)}[ ,]", known[name]), (name, flag)
    assert known.keys() == table.keys()


def _command_lines(program: str) -> list[str]:
    pages = [path for path in [*PAGES, *SOURCES] if path.name != "CHANGELOG.md"]
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in pages)
    return re.findall(rf"{program} ([a-z]+[^`\n#]*)", text)


def test_sources_name_only_files_that_exist():
    files = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    wrong = []
    for source in SOURCES:
        for name in re.findall(r"``([\w/]+\.py)``|(?<=Read )([\w/]+\.py)", source.read_text()):
            named = f"/{name[0] or name[1]}"
            wrong += [] if any(f"/{file}".endswith(named) for file in files) else [f"{source}: {named[1:]}"]
    assert not wrong


def test_the_figure_of_the_readme_is_drawn_from_the_numbers_on_file(tmp_path):
    drawing = run(ROOT / "docs" / "figures" / "draw.py", [(ROOT / "docs" / "figures" / "draw.py").read_text()])
    assert drawing["RESULTS"] == ROOT / "experiments" / "results"
    for name in ("recall.jsonl", "knowledge.jsonl", "optimizers_toy.jsonl"):
        assert drawing["rows"](name)
    drawing["main"](tmp_path / "overview.png")
    drawn, kept = tmp_path / "overview.png", Path(ROOT / "docs" / "figures" / "overview.png")
    assert drawn.read_bytes()[:4] == kept.read_bytes()[:4] == b"\x89PNG"
