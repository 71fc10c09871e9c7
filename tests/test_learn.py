"""The command that reads a document and keeps it: what it stores and says, interruptions and mistakes."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_run import mistake

from hope_jax import context
from hope_jax.cli import ask, learn, runs
from hope_jax.cli.main import main
from hope_jax.cli.runs import load_run
from hope_jax.context.stream import read_without_learning
from hope_jax.context.writes import cross_entropy
from hope_jax.errors import UserError
from hope_jax.signals import Interrupt


def test_reading_a_document_lowers_surprise_and_is_kept(learned, document):
    run, said = learned
    model, params, tokenizer, *_ = load_run(run)
    lines = [line.split() for line in said.splitlines() if " to " in line]
    assert lines[-1][:3] == ["0", "to", f"{2 * len(tokenizer.encode(document.read_text())):,}"]
    first, last = (float(line[3]) for line in (lines[0], lines[-2]))
    assert last < first and last < float(lines[-2][4]), "the levels, not the context, make the difference"
    state = context.load(run / "contexts" / "4.safetensors", model, params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.blocks.feed_forward)), "every level is written"


def test_what_is_printed_without_learning_is_the_loss_of_the_model_as_trained(trained):
    model, params, *_ = load_run(trained)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 17)))
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    static, parts = context.start(model, params, 1), []
    for piece in (tokens[:, :1], tokens[:, 1:9], tokens[:, 9:]):
        nats, static = read_without_learning(model, params, static, piece)
        parts.append(nats)
    expected = cross_entropy(logits[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(static.levels))


BEGIN = learn.Reading(None, 0)
FINISHED = {"stopped": {}, "inside": None}


class StopAfter(Interrupt):
    """Asks to stop after so many pieces, as Ctrl-C does."""

    signal = None

    def __init__(self, pieces):
        self._left = pieces

    @property
    def requested(self):
        self._left -= 1
        return self._left == 0


@pytest.fixture
def shown(monkeypatch):
    """What ``learn`` adds to its report: tokens, nats, nats without learning of every piece."""
    pieces, add = [], learn.Report.add
    monkeypatch.setattr(learn.Report, "add", lambda self, *piece: (pieces.append(piece), add(self, *piece)))
    return pieces


def test_reading_that_was_stopped_goes_on_as_if_it_never_had(trained, tmp_path, shown):
    one = load_run(trained)
    document = np.random.default_rng(0).integers(0, 256, 80)
    documents, data = [document, document[:32]], learn.DocumentConfig(("text.txt",))
    config = learn.LearnConfig(checkpoint=trained, data=data, window=64)  # as much as the caches hold
    straight = learn.read(one, config, documents, BEGIN, StopAfter(-1))
    whole = shown.copy()
    state = context.start(one.model, one.params, 1, 64)
    for known, window in learn.windows(documents, 64, 0):
        assert not known.size
        _, state = context.learn(one.model, one.params, context.clear(one.model, one.params, state, 64), window[None])
    by_hand = context.finish(one.model, one.params, state).blocks.feed_forward
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        straight.state.blocks.feed_forward,
        by_hand,
    )
    for pieces in (2, 5):
        shown.clear()
        part = learn.read(one, config, documents, BEGIN, StopAfter(pieces))
        context.save(tmp_path / "context", one.model, one.params, part.state)
        state = context.load(tmp_path / "context", one.model, one.params)
        rest = learn.read(one, config, documents, learn.Reading(state, part.done), StopAfter(-1))
        assert rest.finished and not part.finished and rest.done == straight.done == 112 > part.done
        jax.tree.map(np.testing.assert_array_equal, rest.state, straight.state)
        for found, expected in zip(shown, whole, strict=True):
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_documents_and_windows_begin_with_an_empty_context():
    documents = [np.arange(5), np.arange(7), np.arange(0)]

    def cut(*how):
        return [(known.tolist(), rest.tolist()) for known, rest in learn.windows(documents, *how)]

    assert cut(None, 0) == [([], list(range(5))), ([], list(range(7)))]
    assert cut(4, 0) == [([], [0, 1, 2, 3]), ([], [4]), ([], [0, 1, 2, 3]), ([], [4, 5, 6])]
    assert cut(4, 6) == [([0], [1, 2, 3]), ([], [4, 5, 6])]
    assert cut(4, 9) == [([], [4, 5, 6])] and cut(4, 12) == []
    assert [piece.tolist() for piece in learn.pieces(np.arange(5), 3)] == [[[0, 1, 2]], [[3, 4]]]


def test_the_command_that_asks_has_the_flags_of_the_reading():
    config = learn.LearnConfig(checkpoint=Path("run"), data=learn.DocumentConfig(("text.txt",)), rate=0.5)
    assert config.flags() == ["--checkpoint", "run", "--rate", "0.5"]


@pytest.fixture
def reading(trained, document, tmp_path, heard):
    """The command that reads the document twice with a copy of the run, and where that keeps what it learned."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    command = ["learn", "--checkpoint", str(run), "--data.path", str(document), "--passes", "2"]
    return command, run / "contexts" / "4.safetensors"


def interrupt_at(monkeypatch, owner, name, call):
    """The process gets Ctrl-C in the midst of that ``call`` of a function, the first is 1."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def test_ctrl_c_keeps_what_was_read_and_the_same_command_goes_on(reading, monkeypatch, capfd):
    command, place = reading
    assert main(command) == 0
    said = capfd.readouterr().out
    assert f'python -m hope_jax ask "..." --checkpoint {place.parents[1]}\n' in said
    straight = place.rename(place.with_name("straight"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, learn.context, "surprise", 3)
        assert main(command) == 130
    assert "Stopped after 48 tokens, which are kept; to go on: the same command." in capfd.readouterr().out
    assert main(command) == 0
    said = capfd.readouterr().out
    assert f"Going on from the context in {place}, after 48 tokens of this reading." in said
    assert min(int(line.split()[0].replace(",", "")) for line in said.splitlines() if " to " in line) == 48
    assert place.read_bytes() == straight.read_bytes(), "to the bit"
    assert context.note(place) == FINISHED


@pytest.mark.slow
def test_what_is_done_in_between_takes_nothing_from_a_stopped_reading(reading, monkeypatch, tmp_path, capfd):
    command, place = reading
    with monkeypatch.context() as patch:
        interrupt_at(patch, learn.context, "surprise", 3)
        assert main(command) == 130
    (tmp_path / "other.txt").write_text("Another lighthouse burns red. " * 4)
    for other in (
        [*command, "--passes", "1", "--rate", "0.5"],
        [*command, "--window", "32"],
        [*command, "--data.path", str(tmp_path / "other.txt")],
    ):
        capfd.readouterr()
        assert main(other) == 0
        assert f"Going on from the context in {place}.\n" in capfd.readouterr().out, (
            "another reading begins at its beginning"
        )
    assert main(["ask", "--checkpoint", str(place.parents[1]), "--tokens", "4", "--clear", "--learn", "The light"]) == 0
    assert main(command) == 0
    assert "after 48 tokens of this reading" in capfd.readouterr().out
    assert context.note(place) == FINISHED


def test_one_command_at_a_time_writes_a_context(reading, monkeypatch, capfd):
    command, place = reading
    config = runs.Source(checkpoint=place.parents[1])
    answers = []
    monkeypatch.setattr(ask, "answer", lambda *given: answers.append(given))
    with config.alone(load_run(place.parents[1])):
        assert "Another command writes the context in" in mistake(capfd, *command)
        asking = ["ask", "--checkpoint", place.parents[1], "--tokens", 4]
        assert "Another command writes the context in" in mistake(capfd, *asking, "--learn", "The light")
        assert main([str(word) for word in asking] + ["The light"]) == 0, "who only reads need not wait"
    assert len(answers) == 1
    assert main(command) == 0


def test_who_hears_no_more_loses_nothing(reading, monkeypatch):
    command, place = reading

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(learn.tqdm, "write", closed)
    assert main(command) == 0
    assert context.note(place) == FINISHED


@pytest.mark.parametrize("where", ["last piece", "save"])
@pytest.mark.slow
def test_ctrl_c_at_the_end_loses_nothing(reading, monkeypatch, capfd, where):
    command, place = reading
    total = 2 * len(load_run(place.parents[1]).tokenizer.encode(Path(command[4]).read_text()))
    pieces = sum(
        -(-size // 16) for _, window in learn.windows([np.zeros(total // 2)] * 2, 64, 0) for size in [len(window)]
    )
    spot = {"last piece": (learn.context, "surprise", pieces), "save": (learn.context, "save", 1)}
    interrupt_at(monkeypatch, *spot[where])
    assert main(command) == 0
    assert f"0 to {total}" in capfd.readouterr().out.splitlines()[-3]
    assert context.note(place) == FINISHED


def test_a_mistake_at_the_very_end_keeps_what_was_read(reading, monkeypatch, capfd):
    command, place = reading

    def fails(*_):
        raise UserError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(learn.context, "finish", fails)
        assert main(command) == 2
    assert "(they are kept): not finite" in capfd.readouterr().err.splitlines()[-1]
    assert len(context.note(place)["stopped"]) == 1
    assert main(command) == 0
    assert context.note(place) == FINISHED


def test_a_mistake_in_the_middle_keeps_what_was_read(reading, monkeypatch, capfd):
    command, place = reading
    surprise, calls = context.surprise, itertools.count()

    def fails(*args):
        if next(calls) == 3:
            raise UserError("not finite")
        return surprise(*args)

    with monkeypatch.context() as patch:
        patch.setattr(learn.context, "surprise", fails)
        assert main(command) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "After 48 tokens (they are kept): not finite"
    assert list(context.note(place)["stopped"].values()) == [48]
    before = place.read_bytes()
    with monkeypatch.context() as patch:
        calls = itertools.count()
        patch.setattr(learn.context, "surprise", fails)
        assert main([*command, "--fresh"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "After 48 tokens (nothing was saved): not finite"
    assert place.read_bytes() == before, "what is there is worth more than so little"
    assert main(command) == 0
    assert "after 48 tokens of this reading" in capfd.readouterr().out


def test_ask_writes_nothing_before_its_settings_are_known_to_be_right(trained, capfd):
    for name, wrong in (("--temperature", "-1"), ("--top-k", "100000"), ("--top-p", "2")):
        assert main(["ask", "hi", "--checkpoint", str(trained), name, wrong]) == 2
        out, error = capfd.readouterr()
        assert not out and len(error.splitlines()) == 1 and f"{name[2:].replace('-', '_')} is {wrong}" in error


def test_mistakes_are_one_plain_sentence(learned, document, tmp_path, capfd):
    run, _ = learned
    (tmp_path / "empty.txt").write_text("")
    reading = ["learn", "--checkpoint", run, "--data.path"]
    assert "There is no trained model in" in mistake(capfd, "ask", "--checkpoint", tmp_path, "x")
    assert "There is no saved step 3" in mistake(capfd, "ask", "--checkpoint", run / "checkpoints" / "3", "x")
    assert "seed is 4294967296" in mistake(capfd, "ask", "--checkpoint", run, "--seed", 2**32, "x")
    assert "is empty" in mistake(capfd, *reading, tmp_path / "empty.txt")
    assert "--data.path names nothing" in mistake(capfd, *reading)
    assert "--periods are [8]; give one for each of the 2" in mistake(capfd, *reading, document, "--periods", 8)
    assert "do not nest" in mistake(capfd, *reading, document, "--periods", 8, 12)
    assert "period is 0" in mistake(capfd, *reading, document, "--periods", 0, 16)
    assert "--rate must be 0 or more, got -1.0" in mistake(capfd, *reading, document, "--rate", -1)
    assert "'fast' is no number; expected --temperature FLOAT" in mistake(
        capfd, "ask", "--temperature", "fast", *reading[1:3], "x"
    )
    watching = ["watch", *reading[1:], document, "--figure"]
    assert "choose another --figure" in mistake(capfd, *watching, tmp_path / "empty.txt" / "figure.png")
    assert "give the name of a .png file" in mistake(capfd, *watching, tmp_path / "figure.svg")
    assert "--passes must be at least 1" in mistake(capfd, *reading, document, "--passes", 0)
    for place in (tmp_path, tmp_path / "empty.txt" / "there"):
        assert "choose another place" in mistake(capfd, *reading, document, "--fresh", "--context", place)
    assert "An argument is missing: Text to go on from; see" in mistake(capfd, "ask", "--checkpoint", run)
    assert "The prompt is empty" in mistake(capfd, "ask", "--checkpoint", run, "")
    assert "add --clear" in mistake(capfd, "ask", "--checkpoint", run, "--tokens", 64, "x")
    other = mistake(capfd, "ask", "--checkpoint", run, "--periods", 8, 16, "x")
    assert "is of another model: feed_forward.levels.0.period is 16 there and 8 here" in other
    assert "no saved context" in mistake(capfd, "ask", "--checkpoint", run, "--context", tmp_path / "none", "x")
