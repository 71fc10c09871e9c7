"""What ``pretrain`` leaves behind: the learning curve, and how the model continues a text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import LanguageModel, generate
from hope_jax import train as training
from hope_jax.cli.plots import plot
from hope_jax.context.schedule import learns_in_context
from hope_jax.data import TextData, Tokenizer
from hope_jax.train.sharding import own

PROMPT = 128
"""Tokens of the longest prompt of a sample."""


def draw(run: Path, title: str) -> Path:
    """Draw bits per byte in training and on held-out batches against tokens; returns the path of the PNG."""
    rows = training.read_rows(run / "metrics.jsonl")
    with plot(path := run / "loss.png") as axes:
        for split, style in {"train": {"linewidth": 0.8, "alpha": 0.7}, "heldout": {"marker": "o"}}.items():
            points = [(row["tokens"], row["bits_per_byte"]) for row in rows if row["split"] == split]
            axes.plot(*zip(*points, strict=True), label=split, **style)
        axes.set(xlabel="tokens", ylabel="bits per byte", title=title)
    return path


def continued(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    text: TextData,
    prompt: int,
    steps: int,
    seed: int,
    whole: bool,
) -> str:
    """The beginning of the first held-out text, up to ``prompt`` tokens, and ``steps`` tokens that the model adds.

    Levels that training writes in context are written here, too. ``whole``: all parameters are moved to one
    device first; else they stay where they are.
    """
    params = own(params)
    if params is None:
        return "None: several processes hold the parameters; `ask` writes with the run folder.\n"
    if whole:
        params = jax.device_put(params, jax.devices()[0])
    window = np.asarray(next(iter(text.heldout_batches(batch=1, limit=1))))
    given = window[:, : max(1, min(PROMPT, prompt))]
    state = model.init_state(params, batch=1, capacity=given.shape[1] + steps)
    how: dict[str, Any] = {"temperature": 0.8, "key": jax.random.key(seed), "learn": learns_in_context(model)}
    tokens, _ = generate.sample(model, params, state, jnp.asarray(given), steps=steps, **how)
    return f"{tokenizer.decode(given[0])}[the model goes on]{tokenizer.decode(np.asarray(tokens)[0])}\n"
