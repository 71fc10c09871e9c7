"""A small model's run folder and what it learned from a document: fixtures of the tests of commands that use one.

The model is put together by hand and has no name: a run folder is all that the commands need.
"""

import contextlib
import dataclasses
import functools
import io
import shutil

import pytest
from made_once import once

from hope_jax import MODELS
from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.context import piece
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.levels import Level
from hope_jax.models import with_in_context
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.train.run import keep_tokenizer

ROW = MODELS["hope_attention-tiny"]
# Quick to compile; full attention with room for 64 tokens, so that longer documents are read in several windows.
SMALL = dataclasses.replace(
    ROW,
    width=32,
    layers=1,
    context=64,
    mixer=dataclasses.replace(ROW.mixer, heads=2),
    feed_forward=dataclasses.replace(ROW.feed_forward, hidden=48, levels=(Level(64),)),
)


@pytest.fixture(scope="module")
def short_pieces():
    """Documents are read in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece, "PIECE", 16)
        yield


def train(place, bpe):
    """Fill ``place`` with a text and the run folder ``run`` of a model that read some of it."""
    path = place / "text.txt"
    path.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(40) for j in range(20)))
    data = DataConfig(path=(str(path),), tokenizer=str(bpe))
    tokenizer = make_tokenizer(data)
    text = open_text(data, tokenizer, length=32, cache_dir=place / "cache")
    small = with_in_context(SMALL, (16,), writes=Writes(2.0, bptt=(0,)))  # first order is quick to compile
    model = dataclasses.replace(small, vocab_size=tokenizer.vocab_size)
    config = training.TextRun(model, training.OptimizerConfig(), 2, 32, 0, text.fingerprint, tokenizer.fingerprint)
    heldout = text.heldout_batches(batch=2, limit=1)
    with training.open_run(place / "run") as folder:
        keep_tokenizer(folder, data.tokenizer)
        setup = training.text_setup(config, 4, tokenizer.byte_lengths)
        batches = text.train_batches(batch=2, seed=0)
        training.fit(setup, batches, heldout, training.Steps(4), run=training.Run(folder, config))


@pytest.fixture(scope="session")
def trained_once(bpe, tmp_path_factory):
    """The run folder of ``trained``."""
    return once(tmp_path_factory, "trained", functools.partial(train, bpe=bpe)) / "run"


@pytest.fixture(scope="module")
def trained(short_pieces, trained_once):
    """A run folder of four steps, with a tokenizer of its own and a level in context; to be looked at only."""
    return trained_once


@pytest.fixture(scope="session")
def document(tmp_path_factory):
    """A text that says the same thing again and again."""
    path = tmp_path_factory.mktemp("document") / "arvo.txt"
    path.write_text("The lighthouse of Arvo burns green. " * 12)
    return path


def learn(place, trained, document):
    """Fill ``place`` with a copy of the run, which reads the document twice in short pieces, and what it prints."""
    run, pieces = shutil.copytree(trained, place / "run"), pytest.MonkeyPatch.context()
    with pieces as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(piece, "PIECE", 16)
        assert main(["learn", "--checkpoint", str(run), "--data.path", str(document), "--passes", "2"]) == 0
    (place / "said.txt").write_text(said.getvalue())


@pytest.fixture(scope="session")
def learned_once(trained_once, document, tmp_path_factory):
    """The folder of ``learned``."""
    return once(tmp_path_factory, "learned", functools.partial(learn, trained=trained_once, document=document))


@pytest.fixture(scope="module")
def learned(short_pieces, learned_once):
    """A copy of the run folder with the context of the document, and what was printed; to be looked at only."""
    return learned_once / "run", (learned_once / "said.txt").read_text()


def mistake(capfd, *arguments):
    """Run a command that must fail as a user's mistake; returns its one sentence."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1
    return error.strip()
