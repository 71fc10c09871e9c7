"""Let a trained model read documents and keep what it read: surprise goes down, and the levels are saved.

    python -m hope_jax learn --checkpoint runs/hope-tiny --data.path notes.txt
    python -m hope_jax learn --checkpoint runs/hope-tiny --data.path notes.txt --passes 3 --periods 64 256

Each level of the model's continuum memory is rewritten whenever its period is over (``hope_jax.context``). Printed
are bits per byte as the text is read, beside those of the same model when nothing is written: what the levels are
worth. The context (what the levels stored, and what the mixers hold) is saved beside the run; the same command with
another document goes on from it. ``ask`` generates from it. Ctrl-C saves; the same command then goes on where it was.
"""

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from hope_jax import context
from hope_jax import train as training
from hope_jax.cli.checks import at_least
from hope_jax.cli.parse import parse
from hope_jax.cli.runs import Source, Trained, readings
from hope_jax.context.piece import piece_size
from hope_jax.context.stream import read_without_learning
from hope_jax.data.text.files import from_files
from hope_jax.errors import UserError
from hope_jax.nn.room import slots_of
from hope_jax.storage.digests import digest_arrays
from hope_jax.types import Int

LINES = 8  # printed per pass


@dataclass(frozen=True)
class DocumentConfig:
    """What to read."""

    path: tuple[str, ...]
    """Text files, folders (read recursively) or globs; each file is read on an empty context, in the order of names."""

    def __post_init__(self):
        if not self.path:
            raise UserError("--data.path names nothing; give text files, folders or globs.")


@dataclass(frozen=True, kw_only=True)
class LearnConfig(Source):
    """Read documents and store them in the levels of a trained model."""

    fresh: bool = False  # Start anew instead of going on from the context that is saved there.
    passes: int = 1  # How often to read everything.
    window: int | None = None
    """Tokens after which the context is emptied within a document; the levels keep what they stored. None: when the
    caches of attention are full, or never."""
    data: DocumentConfig

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "passes")
        if self.window is not None:
            at_least(self, 1, "window")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config, stop = parse(LearnConfig, arguments, "python -m hope_jax learn"), training.Interrupt()
    trained = config.trained()
    documents = [trained.tokenizer.encode(text) for text in texts(config.data.path)]
    # A command with the same documents, passes and window continues a reading that was stopped.
    task = digest_arrays([*documents, np.array([config.passes, config.window or 0])])
    with config.alone(trained) as place, stop:
        begun, stopped = _begin(trained, config, task)
        reading = read(trained, config, documents, begun, stop)
        if reading.error and (config.fresh or reading.done == begun.done):
            raise _said(reading.error, reading.done, "nothing was saved")
        stopped |= {task: reading.done}
        if reading.finished:
            del stopped[task]
        note = {"stopped": stopped, "inside": None if reading.finished else task}
        context.save(place, trained.model, trained.params, reading.state, note)
    if reading.error:
        raise _said(reading.error, reading.done, "they are kept")
    print(f"saved: {place}")
    if reading.finished:
        print(f'To ask: python -m hope_jax ask "..." {shlex.join(config.flags())}')  # --periods takes what follows
        return 0
    again = "the same command without --fresh" if config.fresh else "the same command"
    print(f"Stopped after {reading.done:,} tokens, which are kept; to go on: {again}.")
    return 128 + (stop.signal or 0)


def _said(error: Exception, done: int, kept: str) -> Exception:
    """The error that ended a reading; a UserError also says after how many tokens."""
    return UserError(f"After {done:,} tokens ({kept}): {error}") if isinstance(error, UserError) else error


def _begin(trained: Trained, config: LearnConfig, task: str) -> tuple["Reading", dict[str, int]]:
    """Where to start; and, for each reading that was stopped, the tokens that it had read."""
    place = config.place(trained)
    if config.fresh or not place.exists():
        return Reading(None, 0), {}
    state, note = config.saved(trained), readings(place)
    done = note["stopped"].get(task, 0)
    print(f"Going on from the context in {place}" + (f", after {done:,} tokens of this reading." if done else "."))
    if done and note["inside"] != task:  # the context has read something else since
        state = context.clear(trained.model, trained.params, state, _window(trained, config))
    return Reading(state, done), note["stopped"]


def texts(paths: Sequence[str]) -> list[bytes]:
    """The documents. Raises UserError where there is nothing to read."""
    corpus = from_files(paths)
    if corpus.left_out:
        print(corpus.left_out, file=sys.stderr)
    return [corpus.read(i) for i in range(len(corpus.names))]


class Reading(NamedTuple):
    """The state after ``done`` tokens (None: fresh), and what ended it."""

    state: Any
    done: int
    finished: bool = False
    error: Exception | None = None


def read(
    trained: Trained, config: LearnConfig, documents: Sequence[np.ndarray], begun: Reading, stop: training.Interrupt
) -> Reading:
    """Read all ``documents`` ``config.passes`` times, or until asked to stop; prints bits per byte.

    ``begun`` is where to start. At the end of the last document every level stores what it has gathered
    (``context.finish``). A reading that was stopped, or met an error, does not do so: it goes on where it was.
    """
    model, params, size = trained.model, trained.params, _window(trained, config)
    piece = piece_size(model)
    total, done = config.passes * sum(map(len, documents)), begun.done
    state = context.start(model, params, batch=1, capacity=size) if begun.state is None else begun.state
    report = Report(done, max(1, total // (LINES * config.passes)), trained.tokenizer.byte_lengths)
    with training.progress(total=total, initial=done, unit="token", unit_scale=True) as bar:
        for known, window in windows(list(documents) * config.passes, size, done):
            static = context.start(model, params, 1, size)
            for tokens in pieces(known, piece):  # which were read before the reading was stopped
                _, static = read_without_learning(model, params, static, tokens)
                if stop.requested:
                    return Reading(state, done)
            if not known.size:
                state = context.clear(model, params, state, size)
            for tokens in pieces(window, piece):
                try:
                    nats, state = context.surprise(model, params, state, tokens)
                except Exception as error:  # of any kind: what was read is kept
                    return Reading(state, done, error=error)
                done += tokens.shape[1]
                as_trained, static = read_without_learning(model, params, static, tokens)
                report.add(tokens[0], np.asarray(nats)[0], np.asarray(as_trained)[0])
                bar.update(tokens.shape[1])
                if done < total and stop.requested:
                    return Reading(state, done)
    report.end()
    try:
        return Reading(context.finish(model, params, state), done, finished=True)
    except UserError as error:
        return Reading(state, done, error=error)


def _window(trained: Trained, config: LearnConfig) -> int | None:
    """Tokens that are read before the context is emptied: --window, or else the room in the caches of attention."""
    if config.window is not None:
        return config.window
    blocks = jax.eval_shape(lambda: trained.model.init_state(trained.params, batch=1))
    return slots_of(blocks)


def windows(
    documents: Sequence[np.ndarray], size: int | None, done: int
) -> Iterator[tuple[Int[np.ndarray, " known"], Int[np.ndarray, " T"]]]:
    """The tokens of one context, up to ``size``, in two parts: those among the first ``done`` of all, and the rest."""
    for document in documents:
        for start in range(0, len(document), size or len(document) or 1):
            window = document[start:][:size]
            if done < len(window):
                yield window[:done], window[done:]
            done = max(0, done - len(window))


def pieces(tokens: Int[np.ndarray, " T"], size: int) -> Iterator[Int[np.ndarray, "1 piece"]]:
    """Up to ``size`` tokens at a time."""
    for at in range(0, len(tokens), size):
        yield tokens[None, at : at + size]


class Report:
    """Prints bits per byte, every ``each`` tokens from ``done`` on, and in all."""

    def __init__(self, done: int, each: int, byte_lengths: np.ndarray):
        self._start, self._each, self._lengths = done, each, byte_lengths
        # Sums of what is printed, and of what comes next: tokens, bits and bytes, bits and bytes without learning.
        self._all, self._next = np.zeros(5), np.zeros(5)
        _say(f"{'tokens':>23}  bits per byte  without learning")

    def add(self, tokens: np.ndarray, nats: np.ndarray, static: np.ndarray) -> None:
        """Add a piece: ``nats`` and ``static`` are those of its last tokens, which were predicted."""
        self._next += [len(tokens), *self._bits(tokens, nats), *self._bits(tokens, static)]
        if self._next[0] >= self._each:
            self._print_next()

    def end(self) -> None:
        """Print what is left, and the sums of everything."""
        if self._next[0]:
            self._print_next()
        if self._all[0]:
            self._print(self._start, self._all)

    def _bits(self, tokens: np.ndarray, nats: np.ndarray) -> tuple[float, float]:
        predicted = tokens[len(tokens) - len(nats) :]
        return float(nats.sum()) / math.log(2), float(self._lengths[predicted].sum())

    def _print_next(self) -> None:
        self._print(self._start + int(self._all[0]), self._next)
        self._all, self._next = self._all + self._next, np.zeros(5)

    def _print(self, start: int, sums: np.ndarray) -> None:
        tokens, bits, size, static, static_size = sums
        where = f"{start:,} to {start + int(tokens):,}"
        rates = (f"{of / bytes_:.3f}" if bytes_ else "-" for of, bytes_ in ((bits, size), (static, static_size)))
        _say("{:>23}  {:>13}  {:>16}".format(where, *rates))


def _say(line: str) -> None:
    """Print beside the progress bar. A closed output does not end the reading: what is read is kept."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(line, file=sys.stdout)
