"""Look into a model while it reads a document: surprise, inner rate and retention, what each level stores; one figure.

    python -m hope_jax watch --checkpoint runs/hope-tiny --data.path notes.txt
    python -m hope_jax watch --checkpoint runs/hope-tiny --data.path notes.txt --periods 64 256 --tokens 8192

Draws into ``--figure`` (PNG), and writes the numbers beside it, with ``.json`` after its name. The second curve of
surprise is that of the same model when nothing is written. Begins with what ``learn`` saved, if there is any, and an
empty context. Nothing is changed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hope_jax import context
from hope_jax import trace as tracing
from hope_jax.cli.checks import at_least
from hope_jax.cli.learn import DocumentConfig, texts
from hope_jax.cli.parse import parse
from hope_jax.cli.results import open_results
from hope_jax.cli.runs import Source
from hope_jax.context.stream import read_without_learning
from hope_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Source):
    """Watch a trained model read and store a document."""

    tokens: int = 2048  # Tokens to read, from the beginning.
    figure: Path | None = None  # File of the figure. None: watch.png in the run folder.
    fresh: bool = False  # Begin with the levels as they were trained, whatever was learned since.
    data: DocumentConfig

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "tokens")
        if self.figure is not None and self.figure.suffix != ".png":
            raise UserError(f"--figure is {self.figure}; give the name of a .png file.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(WatchConfig, arguments, "python -m hope_jax watch")
    trained = config.trained()
    figure = trained.run / "watch.png" if config.figure is None else config.figure
    ids = np.concatenate([trained.tokenizer.encode(text) for text in texts(config.data.path)])
    tokens = jnp.asarray(ids[None, : config.tokens])
    model, params, room = trained.model, trained.params, tokens.shape[1]
    unread, learned = context.start(model, params, 1, room), None if config.fresh else config.saved(trained)
    begin = unread if learned is None else context.clear(model, params, learned, room)
    # An error now is better than one after the reading.
    figure, numbers = (open_results(figure.parent, f"{figure.name}{end}", "--figure") for end in ("", ".json"))
    trace, _ = tracing.watch(model, params, begin, tokens, progress=True)
    static, _ = read_without_learning(model, params, unread, tokens)
    title = f"{trained.run.name} reads {Path(config.data.path[0]).name}"
    tracing.draw(trace, figure, title, compare=np.asarray(static))
    numbers.write_text(json.dumps(trace.numbers()))
    print(f"written: {figure}, {numbers}")
    return 0
