"""Flags from a TOML file: those of the published runs, and what is wrong with a file."""

from pathlib import Path

import pytest

from hope_jax.cli.parse import parse, with_file
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.errors import UserError

RUNS = Path(__file__).parent.parent / "experiments" / "published"


def flags(*given):
    """The flags of ``pretrain``, some of them from a file."""
    return parse(PretrainConfig, with_file(["--run", "x", *map(str, given)], "--config"), "pretrain")


@pytest.mark.parametrize(("size", "tokens"), [("340m", 15e9), ("760m", 30e9), ("1.3b", 100e9)])
def test_the_published_runs_have_their_number_of_tokens(size, tokens):
    found = flags("--config", RUNS / f"hope-{size}.toml")
    assert found.model == f"hope-{size}" and found.optimizer.learning_rate == 4e-4
    assert found.steps * found.batch * found.length == pytest.approx(tokens, rel=1e-4)
    assert found.batch * found.length == pytest.approx(0.5e6, rel=0.05)


def test_a_flag_that_is_given_counts_more_than_the_file(tmp_path):
    file = tmp_path / "a.toml"
    lists = '[data]\npath = ["a", "b"]\n[optimizer]\nmethod = "m3"\nslow-period = 9'
    file.write_text(f"steps = 7\nbatch = 2\ncompile_cache = false\n{lists}")
    found = flags(f"--config={file}", "--batch", 3, "--optimizer.slow_period", 5)
    assert (found.steps, found.batch, found.compile_cache, found.data.path) == (7, 3, False, ("a", "b"))
    assert found.optimizer.method.slow_period == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be read: No such file"), ("steps", "is no TOML"), ("stepz = 1", "no flag --stepz; did you mean")],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, said):
    if text is not None:
        (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        flags("--config", tmp_path / "a.toml")
