"""What a loaded model computes, and how far it is from a reference."""

import functools

import jax
import numpy as np

from hope_jax.nn.language_model import LanguageModel


@functools.partial(jax.jit, static_argnames="config")
def read(config, params, tokens):
    """Logits of fresh sequences."""
    return LanguageModel(config).apply({"params": params}, tokens)[0]


def distance(ours, theirs):
    """Largest difference in units of the largest logit."""
    return np.max(np.abs(np.asarray(ours, np.float64) - theirs)) / np.max(np.abs(theirs))
