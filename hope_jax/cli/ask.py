"""Let a model write with what it has learned: the run of ``pretrain`` and the context that ``learn`` saved.

    python -m hope_jax ask "def main(" --checkpoint runs/hope-tiny
    python -m hope_jax ask "def main(" --checkpoint runs/hope-tiny --clear     # with only what the levels stored
    python -m hope_jax ask "def main(" --checkpoint runs/hope-tiny --learn     # and store this exchange, too

Without a saved context the model has what training taught it and nothing else. Nothing is changed unless ``--learn``
says so: levels that training writes in context (``ttt_e2e``, ``--cms.in-context``) are written with ``--learn`` alone.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from hope_jax import context, generate
from hope_jax.cli.checks import at_least
from hope_jax.cli.parse import parse
from hope_jax.cli.runs import Source, Trained, readings
from hope_jax.data import Continuation
from hope_jax.errors import UserError, check_seed
from hope_jax.nn.room import room_left
from hope_jax.sampling import choice


@dataclass(frozen=True, kw_only=True)
class AskConfig(Source):
    """Continue a text with a trained model and what it has learned."""

    prompt: tyro.conf.Positional[str]  # Text to go on from.
    tokens: int = 200  # Tokens to write.
    temperature: float = 0.8  # 0 takes the likeliest token each time, 1 draws from the model's distribution.
    top_k: int | None = None  # Draw among so many likeliest tokens. None: all.
    top_p: float | None = None  # Draw among the likeliest tokens that together have this probability. None: all.
    seed: int = 0  # Seed of the random draws.
    clear: bool = False  # Begin with an empty context: the model then knows only what its levels stored.
    learn: bool = False  # Store the prompt and what is written in the levels, and save that.

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "tokens")
        check_seed(self.seed)
        if not self.prompt:
            raise UserError("The prompt is empty; give some text to go on from.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    config = parse(AskConfig, arguments, "python -m hope_jax ask")
    trained = config.trained()
    choice(trained.model.config.vocab_size, config.temperature, config.top_k, config.top_p)  # refuses others
    prompt = jnp.asarray(trained.tokenizer.encode(config.prompt))[None]
    with config.alone(trained) if config.learn else contextlib.nullcontext() as place:
        state = answer(trained, config, prompt, begin(trained, config, prompt))
        if place:
            state = context.finish(trained.model, trained.params, state)
            note = readings(place) | {"inside": None}  # readings that were stopped can still go on
            context.save(place, trained.model, trained.params, state, note)
            print(f"saved: {place}", file=sys.stderr)
    return 0


def begin(trained: Trained, config: AskConfig, prompt: Any) -> Any:
    """The state to read the prompt with.

    Raises:
        UserError: the context is damaged, of other levels, named but not there, or has no room for so many tokens.
    """
    model, params, place = trained.model, trained.params, config.place(trained)
    needed, state = prompt.shape[1] + config.tokens, config.saved(trained)
    # What is kept must have room for what comes next.
    capacity = max(needed + 1, model.config.context) if config.learn else needed
    if state is None:
        print(f"There is no context in {place}: nothing was learned since training.", file=sys.stderr)
        return jax.jit(functools.partial(model.init_state, batch=1, capacity=capacity))(params)
    if config.clear:
        return context.clear(model, params, state, capacity)
    room = room_left(state)
    if room is not None and room < needed:
        raise UserError(
            f"The context in {place} has room for {room} more tokens, and this needs {needed}: add --clear to begin "
            "with an empty one, or ask for fewer --tokens."
        )
    return state


def answer(trained: Trained, config: AskConfig, prompt: Any, state: Any) -> Any:
    """Print the tokens as they are written; returns the state after reading all of them, the last one, too."""
    how: dict[str, Any] = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "learn")}
    key, written = jax.random.key(config.seed), Continuation(trained.tokenizer, np.asarray(prompt)[0])
    print(config.prompt, end="", flush=True)
    pieces = generate.stream(trained.model, trained.params, state, prompt, steps=config.tokens, key=key, **how)
    for piece, state in pieces:  # noqa: B007, the last state is returned
        print(written.add(piece[0]), end="", flush=True)
    print()
    if config.learn:
        _, state = context.learn(trained.model, trained.params, state, piece[:, -1:])
    return state
