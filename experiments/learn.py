"""Let a trained model read documents and keep what it read: surprise goes down, and the levels are saved.

    python -m experiments learn --checkpoint runs/hope-tiny --data.path notes.txt
    python -m experiments learn --checkpoint runs/hope-tiny --data.path notes.txt --passes 3 --periods 64 256

Each level of the model's continuum memory is rewritten whenever its period is over (``hope_jax/context.py``). Printed
are bits per byte as the text is read, beside those of the same model when nothing is written: what the levels are
worth. The context (what the levels stored, and what the mixers hold) is saved beside the run; the same command with
another document goes on from it. ``ask`` generates from it. Ctrl-C saves and prints the command that goes on.
"""

import functools
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import parse
from experiments.checks import at_least_one
from experiments.running import progress_interval
from experiments.runs import Source, Trained
from hope_jax import context
from hope_jax import train as training
from hope_jax.data.corpus import from_files
from hope_jax.errors import UserError
from hope_jax.nn.attention import slots_of
from hope_jax.train.array_file import empty_part, is_saved
from hope_jax.types import Array, Int, Tokens
from hope_jax.writes import Nats, cross_entropy, plan_of

PIECE = 512
"""Tokens read at a time, or the period of the fastest level where that is longer."""
LINES = 8
"""Lines printed per pass."""


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

    fresh: bool = False
    """Start anew instead of going on from the context that is saved there."""
    passes: int = 1
    """Times to read everything."""
    window: int | None = None
    """Tokens after which a document is gone on with in an empty context, the levels kept. None: never, or when the
    caches of attention are full."""
    skip: int = 0
    """Tokens to leave out at the beginning: what an interrupted command has read."""
    data: DocumentConfig

    def __post_init__(self):
        at_least_one(self, "passes")
        if self.window is not None:
            at_least_one(self, "window")
        if self.skip < 0:
            raise UserError(f"--skip must be at least 0, got {self.skip}.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config, stop = parse(LearnConfig, arguments, "learn"), training.Interrupt()
    trained = config.trained()
    documents, place = [trained.tokenizer.encode(text) for text in texts(config.data.path)], config.place(trained)
    empty_part(place).rmdir()  # better known now than after the reading
    known = is_saved(place) and not config.fresh
    state = context.load(place, trained.model, trained.params) if known else None
    if known:
        print(f"Going on from the context in {place}.")
    with stop:
        reading = read(trained, config, documents, state, stop)
    context.save(place, trained.model, reading.state)
    print(f"saved: {place}")
    if not stop.requested:
        print(f'To ask: python -m experiments ask --checkpoint {config.checkpoint} "..."')
        return 0
    again = shlex.join(
        [sys.executable, "-m", "experiments", "learn", *_going_on(arguments), f"--skip={reading.tokens}"]
    )
    print(f"Stopped after {reading.tokens:,} tokens; they are kept. To go on:\n  {again}")
    return 128 + (stop.signal or 0)


def _going_on(arguments: Sequence[str]) -> list[str]:
    """``arguments`` without what the next command must not repeat."""
    kept = [argument for argument in arguments if argument not in ("--fresh", "--no-fresh")]
    at = next((i for i, argument in enumerate(kept) if argument.partition("=")[0] == "--skip"), None)
    if at is None:
        return kept
    return kept[:at] + kept[at + (1 if "=" in kept[at] else 2) :]


def texts(paths: Sequence[str]) -> list[bytes]:
    """The documents. Raises UserError where there is nothing to read."""
    corpus = from_files(paths)
    return [corpus.read(i) for i in range(len(corpus.names))]


class Reading(NamedTuple):
    """The state after so many tokens."""

    state: Any
    tokens: int


def read(
    trained: Trained, config: LearnConfig, documents: Sequence[np.ndarray], state: Any, stop: training.Interrupt
) -> Reading:
    """Read all ``documents`` so many times, or until asked to stop; prints how surprising they are.

    ``state`` is what went before, None for nothing. At the end of the last document every level stores what it has
    gathered (``context.finish``); a reading that was stopped goes on from within.
    """
    model, params = trained.model, trained.params
    plan, window = plan_of(model, trained=False), _window(trained, config)
    state = context.start(model, params, batch=1, capacity=window) if state is None else state
    static = Static(model.init_state(params, batch=1, capacity=window), jnp.zeros((1, 0), jnp.int32))
    total, done = config.passes * sum(map(len, documents)), config.skip
    report = Report(done, max(1, total // (LINES * config.passes)), trained.tokenizer.byte_lengths)
    with tqdm(total=total, initial=done, unit="token", unit_scale=True, mininterval=progress_interval()) as bar:
        for begins, tokens in pieces(list(documents) * config.passes, max(PIECE, plan.chunk), window, done):
            if begins:
                state = context.clear(model, params, state, window)
                static = Static(model.init_state(params, 1, window), jnp.zeros((1, 0), jnp.int32))
            nats, state = context.surprise(model, params, state, tokens)
            as_trained, static = read_only(model, params, tokens, static)
            done += tokens.shape[1]
            report.add(np.asarray(tokens)[0], np.asarray(nats)[0], np.asarray(as_trained)[0])
            bar.update(tokens.shape[1])
            if stop.requested:
                return Reading(state, done)
    report.end()
    return Reading(context.finish(model, params, state), done)


def _window(trained: Trained, config: LearnConfig) -> int | None:
    """Tokens that are read before the context is emptied; what attention with a cache has room for if nobody says."""
    if config.window is not None:
        return config.window
    blocks = jax.eval_shape(lambda: trained.model.init_state(trained.params, batch=1))
    return slots_of(blocks)


def pieces(
    documents: Sequence[np.ndarray], size: int, window: int | None, skip: int
) -> Iterator[tuple[bool, Int[Array, "1 T"]]]:
    """Whether the context is to be emptied before it, and up to ``size`` tokens, but for the first ``skip`` in all."""
    for document in documents:
        step = window or len(document)
        for start in range(0, len(document), step):
            left = document[start : start + step]
            begin = min(skip, len(left))
            skip -= begin
            for at in range(begin, len(left), size):
                yield at == 0, jnp.asarray(left[None, at : at + size])


class Static(NamedTuple):
    """A reader that does not learn: the state after all tokens but the ``last`` one, [1, 1] (or none was read yet)."""

    blocks: Any
    last: Int[Array, "1 last"]


@functools.partial(jax.jit, static_argnames="model")
def read_only(model: Any, params: Any, tokens: Tokens, static: Static) -> tuple[Nats, Static]:
    """What ``context.surprise`` gives for the same tokens where nothing is written."""
    every = jnp.concatenate([static.last, tokens], axis=1)
    if every.shape[1] == 1:
        return jnp.zeros((1, 0)), static._replace(last=every)
    logits, blocks = model.apply({"params": params}, every[:, :-1], static.blocks)
    return cross_entropy(logits, every[:, 1:]), Static(blocks, every[:, -1:])


class Report:
    """Prints bits per byte, every ``each`` tokens from ``done`` on, and in all."""

    def __init__(self, done: int, each: int, byte_lengths: np.ndarray):
        self._start, self._each, self._lengths = done, each, byte_lengths
        self._rows: list[list[float]] = []  # of every piece: tokens, bits and bytes, bits and bytes without learning
        self._printed = 0
        tqdm.write(f"{'tokens':>23}  bits per byte  without learning", file=sys.stdout)

    def add(self, tokens: np.ndarray, nats: np.ndarray, static: np.ndarray) -> None:
        """What a piece gave; the last ones of its tokens were predicted."""
        self._rows.append([len(tokens), *self._bits(tokens, nats), *self._bits(tokens, static)])
        if sum(row[0] for row in self._rows[self._printed :]) >= self._each:
            self._print(self._printed)
            self._printed = len(self._rows)

    def end(self) -> None:
        """The rest, and everything together."""
        if self._printed < len(self._rows):
            self._print(self._printed)
        self._print(0)

    def _bits(self, tokens: np.ndarray, nats: np.ndarray) -> tuple[float, float]:
        predicted = tokens[len(tokens) - len(nats) :]
        return float(nats.sum()) / math.log(2), float(self._lengths[predicted].sum())

    def _print(self, first: int) -> None:
        start = self._start + int(sum(row[0] for row in self._rows[:first]))
        tokens, bits, size, static, static_size = np.sum(self._rows[first:], axis=0)
        where = f"{start:,} to {start + int(tokens):,}"
        rates = (f"{of / bytes_:.3f}" if bytes_ else "-" for of, bytes_ in ((bits, size), (static, static_size)))
        tqdm.write("{:>23}  {:>13}  {:>16}".format(where, *rates), file=sys.stdout)
