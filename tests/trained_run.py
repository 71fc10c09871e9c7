"""A small model's run folder and what it learned from a document: fixtures of the tests of commands that use one."""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import pytest

from hope_jax import MODELS
from hope_jax.cli import learn
from hope_jax.cli.main import main
from hope_jax.levels import Level

ROW = MODELS["hope_attention-tiny"]
# Quick to compile; full attention with room for 64 tokens, so that longer documents are read in several windows.
SMALL = dataclasses.replace(
    ROW,
    width=32,
    layers=1,
    context=64,
    mixer=dataclasses.replace(ROW.mixer, heads=2),
    feed_forward=dataclasses.replace(ROW.feed_forward, hidden=48, levels=(Level(64), Level(192))),
)


@pytest.fixture(scope="module")
def rows():
    """A small model, known to the command line by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        patch.setattr(learn, "PIECE", 16)
        yield


@pytest.fixture(scope="module")
def trained(rows, bpe, tmp_path_factory):
    """A run folder of four steps, with a tokenizer of its own and a level in context; to be looked at only."""
    place = tmp_path_factory.mktemp("trained")
    text = place / "text.txt"
    text.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(20)))
    flags = ["--model", "small", "--steps", "4", "--batch", "2", "--length", "32", "--eval-batches", "1"]
    flags += ["--cms.in-context", "16", "--cms.rate", "2", "--sample-tokens", "0", "--no-compile-cache"]
    flags += ["--data.path", str(text), "--data.tokenizer", str(bpe)]
    assert main(["pretrain", "--run", str(place / "run"), *flags]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A text that says the same thing again and again."""
    path = tmp_path_factory.mktemp("document") / "arvo.txt"
    path.write_text("The lighthouse of Arvo burns green. " * 12)
    return path


@pytest.fixture(scope="module")
def learned(trained, document, tmp_path_factory):
    """A copy of the run folder with the context of the document, read twice, and what was printed."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("learned") / "run")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["learn", "--checkpoint", str(run), "--data.path", str(document), "--passes", "2"]) == 0
    return Path(run), said.getvalue()


def mistake(capfd, *arguments):
    """Run a command that must fail as a user's mistake; returns its one sentence."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1
    return error.strip()
