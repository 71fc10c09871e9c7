"""Look into a model while it reads a document: surprise, inner rate and retention, what each level stores; one figure.

    python -m experiments watch --checkpoint runs/hope-tiny --data.path notes.txt
    python -m experiments watch --checkpoint runs/hope-tiny --data.path notes.txt --periods 64 256 --tokens 8192

Draws into ``--figure``, and writes the numbers beside it as JSON. The second curve of surprise is that of the
same model when nothing is written. Begins with what ``learn`` saved, if there is any, and an empty context. Nothing
is changed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments import parse
from experiments.checks import at_least_one
from experiments.learn import DocumentConfig, Static, read_only, texts
from experiments.runs import Source
from hope_jax import context, inspect
from hope_jax.errors import UserError
from hope_jax.train.array_file import is_saved


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Source):
    """Watch a trained model read and store a document."""

    tokens: int = 2048
    """Tokens to read, from the beginning."""
    figure: Path | None = None
    """File of the figure. None: watch.png in the run folder."""
    fresh: bool = False
    """Begin with the levels as they were trained, whatever was learned since."""
    data: DocumentConfig

    def __post_init__(self):
        at_least_one(self, "tokens")
        if self.figure is not None and self.figure.suffix != ".png":
            raise UserError(f"--figure is {self.figure}; give the name of a .png file.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(WatchConfig, arguments, "watch")
    trained = config.trained()
    model, params, place = trained.model, trained.params, config.place(trained)
    ids = np.concatenate([trained.tokenizer.encode(text) for text in texts(config.data.path)])
    tokens = jnp.asarray(ids[None, : config.tokens])
    room = tokens.shape[1]
    if config.fresh or not is_saved(place):
        state = context.start(model, params, 1, room)
    else:
        state = context.clear(model, params, context.load(place, model, params), room)
    trace, _ = inspect.watch(model, params, state, tokens, progress=True)
    static, _ = read_only(model, params, tokens, Static(model.init_state(params, 1, room), tokens[:, :0]))
    path = trained.run / "watch.png" if config.figure is None else config.figure
    inspect.draw(trace, path, f"{trained.run.name} reads {Path(config.data.path[0]).name}", compare=np.asarray(static))
    path.with_suffix(".json").write_text(json.dumps(trace.numbers()))
    print(f"written: {path}, {path.with_suffix('.json')}")
    return 0
