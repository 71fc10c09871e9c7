"""The commands that use a trained run: read a document and keep it, write with it; interruptions and mistakes."""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import learn
from experiments.__main__ import main
from experiments.runs import load_run, with_levels
from hope_jax import MODELS, context
from hope_jax import train as training
from hope_jax.data import JsonTokenizer
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.train.digests import describe
from hope_jax.writes import cross_entropy

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


@pytest.fixture(scope="module", autouse=True)
def rows():
    """A small model, known to the command line by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        patch.setattr(learn, "PIECE", 16)
        yield


@pytest.fixture(scope="module")
def trained(bpe, tmp_path_factory):
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


def test_a_run_folder_is_all_that_one_needs_of_a_trained_model(trained, bpe):
    found = load_run(trained)
    part = found.model.config.feed_forward
    assert found.step == 4 and found.tokenizer.fingerprint == JsonTokenizer(bpe).fingerprint
    assert found.model.config.vocab_size == found.tokenizer.vocab_size > 256
    assert part.in_context == 1 and part.writes.rate == 2 and [level.period for level in part.levels] == [16, 64, 192]
    saved = {n: e for n, e in training.read_manifest(trained, 4).arrays.items() if n.startswith("params/")}
    assert {f"params/{name}": entry for name, entry in describe(found.params).items()} == saved
    assert load_run(trained / "checkpoints" / "4").step == 4


def test_reading_a_document_lowers_surprise_and_is_kept(learned, document):
    run, said = learned
    model, params, tokenizer, *_ = load_run(run)
    lines = [line.split() for line in said.splitlines() if " to " in line]
    assert lines[-1][:3] == ["0", "to", f"{2 * len(tokenizer.encode(document.read_text())):,}"]
    first, last = (float(line[3]) for line in (lines[0], lines[-2]))
    assert last < first and last < float(lines[-2][4]), "the levels, not the context, make the difference"
    state = context.load(run / "contexts" / "4", model, params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.blocks.feed_forward.fast)), "every level is written"


def test_what_is_printed_without_learning_is_the_loss_of_the_model_as_trained(trained):
    model, params, *_ = load_run(trained)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 17)))
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    static, parts = learn.Static(model.init_state(params, 1), tokens[:, :0]), []
    for piece in (tokens[:, :1], tokens[:, 1:9], tokens[:, 9:]):
        nats, static = learn.read_only(model, params, piece, static)
        parts.append(nats)
    expected = cross_entropy(logits[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-4)


class StopAfter:
    """Asks to stop after so many pieces, as Ctrl-C does."""

    signal = None

    def __init__(self, pieces):
        self._left = pieces

    @property
    def requested(self):
        self._left -= 1
        return self._left == 0


def test_reading_that_was_stopped_goes_on_as_if_it_never_had(trained, tmp_path):
    one = load_run(trained)
    document = np.random.default_rng(0).integers(0, 256, 80)
    documents, data = [document, document[:32]], learn.DocumentConfig(("text.txt",))
    config = learn.LearnConfig(checkpoint=trained, data=data, window=48)
    straight = learn.read(one, config, documents, None, StopAfter(-1))
    for pieces in (2, 5):
        part = learn.read(one, config, documents, None, StopAfter(pieces))
        context.save(tmp_path / "context", one.model, part.state)
        state = context.load(tmp_path / "context", one.model, one.params)
        rest = learn.read(one, dataclasses.replace(config, skip=part.tokens), documents, state, StopAfter(-1))
        assert rest.tokens == straight.tokens == 112 > part.tokens
        jax.tree.map(np.testing.assert_array_equal, rest.state, straight.state)


def test_documents_and_windows_begin_with_an_empty_context():
    documents = [np.arange(5), np.arange(7)]
    cut = lambda *how: [(begins, piece[0].tolist()) for begins, piece in learn.pieces(documents, *how)]  # noqa: E731
    assert cut(3, None, 0) == [
        *((True, [0, 1, 2]), (False, [3, 4])),
        *((True, [0, 1, 2]), (False, [3, 4, 5]), (False, [6])),
    ]
    assert cut(9, 4, 0) == [(True, [0, 1, 2, 3]), (True, [4]), (True, [0, 1, 2, 3]), (True, [4, 5, 6])]
    assert cut(9, 4, 6) == [(False, [1, 2, 3]), (True, [4, 5, 6])]


def test_the_command_that_goes_on_repeats_everything_but_the_beginning():
    assert learn._going_on(["--checkpoint", "r", "--fresh", "--skip", "3", "--rate=2"]) == [
        "--checkpoint",
        "r",
        "--rate=2",
    ]
    assert learn._going_on(["--skip=3", "--passes", "2"]) == ["--passes", "2"]


def test_asking_writes_text_and_stores_it_only_if_told_so(learned, tmp_path, capfd):
    run = Path(shutil.copytree(learned[0], tmp_path / "run"))
    command, texts = ["ask", "--checkpoint", str(run), "--tokens", "12", "--clear", "The light"], []
    before = (run / "contexts" / "4" / "about.json").read_text()
    for flags in ([], [], ["--learn"]):
        assert main([*command, *flags]) == 0
        texts.append(capfd.readouterr().out)
        assert ((run / "contexts" / "4" / "about.json").read_text() == before) == (not flags)
    assert texts[0] == texts[1] and texts[0].startswith("The light") and len(texts[0]) > len("The light\n")
    shutil.rmtree(run / "contexts")
    assert main(command) == 0
    asked = capfd.readouterr()
    assert asked.out.startswith("The light") and "the model writes as it was trained" in asked.err


def test_mistakes_are_one_plain_sentence(learned, document, tmp_path, capfd):
    run, _ = learned
    (tmp_path / "empty.txt").write_text("")
    reading = ["learn", "--checkpoint", run, "--data.path"]
    assert "There is no trained model in" in mistake(capfd, "ask", "--checkpoint", tmp_path, "x")
    assert "There is no saved step 3" in mistake(capfd, "ask", "--checkpoint", run / "checkpoints" / "3", "x")
    assert "is empty" in mistake(capfd, *reading, tmp_path / "empty.txt")
    assert "--data.path names nothing" in mistake(capfd, *reading)
    assert "--periods are [8, 16]; give one for each of the 3" in mistake(capfd, *reading, document, "--periods", 8, 16)
    assert "do not nest" in mistake(capfd, *reading, document, "--periods", 8, 12, 24)
    assert "--passes must be at least 1" in mistake(capfd, *reading, document, "--passes", 0)
    for place in (tmp_path, tmp_path / "empty.txt" / "there"):
        assert "choose another place" in mistake(capfd, *reading, document, "--fresh", "--context", place)
    assert "The prompt is empty" in mistake(capfd, "ask", "--checkpoint", run, "")
    assert "add --clear" in mistake(capfd, "ask", "--checkpoint", run, "--tokens", 64, "x")
    other = mistake(capfd, "ask", "--checkpoint", run, "--periods", 8, 16, 32, "x")
    assert "is of another model: feed_forward.levels.0.period is 16 there and 8 here" in other
    assert "no saved context" in mistake(capfd, "ask", "--checkpoint", run, "--context", tmp_path / "none", "x")


def test_levels_can_be_written_at_other_periods_and_rates(trained):
    one = load_run(trained)
    other = with_levels(one, (8, 16, 32), 0.5)
    part = other.model.config.feed_forward
    assert [level.period for level in part.levels] == [8, 16, 32] and part.writes.rate == 0.5
    assert np.all(other.params["blocks"]["feed_forward"]["rate"] == 0.5)
    same = with_levels(one, (), None)
    assert same is one


def test_a_run_of_another_model_than_this_version_builds_is_refused(trained, monkeypatch):
    monkeypatch.setitem(MODELS, "small", dataclasses.replace(SMALL, width=16))
    with pytest.raises(UserError, match="was trained with model.width 32; here it is 16"):
        load_run(trained)
